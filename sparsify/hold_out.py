"""Two disjoint parts of one text, so that what is measured on was not calibrated on."""

from collections.abc import Sequence

# The part at the end that is held out, of the text's characters.
HELD_OUT_SHARE = 0.25
# How a spec names the parts: `stdlib:calibration#rest`, `stdlib:calibration#held-out`.
REST, HELD_OUT = "#rest", "#held-out"


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the first three quarters of the documents' characters and the last, cut after a line where there is one.

    No character is in both. A part of a text that is too short to be cut is empty.
    """
    total = sum(map(len, documents))
    wanted = round((1.0 - HELD_OUT_SHARE) * total)
    rest: list[str] = []
    held_out: list[str] = []
    for document in documents:
        cut = min(max(wanted, 0), len(document))
        if 0 < cut < len(document):
            line = document.find("\n", cut)
            cut = line + 1 if 0 < line + 1 < len(document) else cut
        wanted -= len(document)
        rest += [document[:cut]] if cut else []
        held_out += [document[cut:]] if cut < len(document) else []
    return rest, held_out
