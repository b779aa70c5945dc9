"""Whether the Hugging Face hub answers: its libraries retry for half a minute before they say no."""

import ssl
import urllib.error
import urllib.request

from huggingface_hub import constants, try_to_load_from_cache


def hub_problem() -> str | None:
    """Returns why the hub is unreachable, None where it answers or is meant to be offline (HF_HUB_OFFLINE)."""
    if constants.HF_HUB_OFFLINE:
        return None
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        return None  # It answered.
    except OSError as error:
        reason = getattr(error, "reason", error)
        # A certificate of one's own is set up for the hub's libraries in other ways than for urllib: let them try.
        return None if isinstance(reason, ssl.SSLError) else str(reason)
    return None


def is_cached(model_id: str) -> bool:
    """Whether the local cache holds the configuration of a hub model."""
    return isinstance(try_to_load_from_cache(model_id, "config.json"), str)
