"""`sparsify report`: what is in the page, what it refuses, the card, and how it looks in a browser."""

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sparsify.evals import cold_calls, stream
from sparsify.evals.report_results import COMMANDS, FRONTIER

Run = Any
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

_TASK = "<b>local</b> & code"
_SECTIONS = {"model", "quality", "speed", "bytes", "activations"}
_FIGURES = {
    "tasks", "ppl-p", "comparison", "frontier", "speed", "crossover", "heatmap-sparsity", "heatmap-density",
    "heatmap-rank", "heatmap-error", "activations", "positions", "spectra",
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(
    app: typer.Typer, checkpoint: Path, dense_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The results of every kind, really made by the commands on the tiny checkpoint and its dense model."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'sparsify-llm[eval]'")
    folder = tmp_path_factory.mktemp("stored")
    text, sizes = ["--text", text_file, "--limit", 2], ["--sequences", 4, "--seq-len", 32]
    files = {kind: folder / f"{kind}.json" for kind in COMMANDS} | {"sweep": folder / "sweep"}
    save = {kind: ["--save", path] for kind, path in files.items()}
    methods = ["--methods", "teal,rsparse", "--sparsity", "0.3,0.5"]
    sweep = ["--sparsities", "0.3,0.6", "--method", "rsparse", "--limit", 2, "--no-plot", *sizes]
    commands: list[list[Any]] = [
        ["eval", checkpoint, *text, "--seq-len", 32, *save["perplexity"]],
        ["eval", checkpoint, "--tasks", _TASK, "--include-path", _tasks(folder), *save["tasks"]],
        ["bench", checkpoint, "--rounds", 2, "--new-tokens", 4, "--prompt-tokens", 8, *save["speed"]],
        ["bench", checkpoint, "--crossover", *save["crossover"]],
        ["inspect", checkpoint, "--activations", text_file, *save["activations"]],
        ["measure", dense_model, "--ppl-p", "5%", "--rule", "top-k", *text, "--seq-len", 32, *save["ppl-p"]],
        ["compare", dense_model, *methods, "--calibration", text_file, *text, *sizes, "--no-plot", "--out"],
        ["sweep", dense_model, "--calibration", text_file, *sweep, "--out", files["sweep"]],
    ]
    commands[6].append(files["comparison"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_LEAST_BYTES", 1 << 16)
        patch.setattr(stream, "cache_of", lambda device: None)
        patch.setattr(cold_calls, "last_level_cache", lambda: None)
        for command in commands:
            result = CliRunner().invoke(app, [str(word) for word in command])
            assert result.exit_code == 0, result.output
    return files


@pytest.fixture(scope="module")
def full(app: typer.Typer, checkpoint: Path, stored: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report with every result."""
    out = tmp_path_factory.mktemp("report") / "report"
    flags = [word for path in stored.values() for word in ("--results", str(path))]
    result = CliRunner().invoke(app, ["report", str(checkpoint), "--out", str(out), *flags])
    assert result.exit_code == 0, result.output
    assert "Not stored" not in result.output
    return out


def _tasks(folder: Path) -> Path:
    """Writes a multiple-choice task with a hostile name over a local file."""
    rows = [{"q": f"def mean_{i}(", "choices": ["values):", "class"], "gold": i % 2} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        f"task: '{_TASK}'\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n"
    )
    return folder


class _Page(HTMLParser):
    """Every tag with its attributes, whether all are closed in order, and the text."""

    _VOID = frozenset({"meta", "path", "use", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag]


def test_every_section_and_figure_is_there(full: Path) -> None:
    page = _Page(full / "report.html")
    assert page.open == []
    assert {found["id"] for found in page.attributes("section")} == _SECTIONS
    assert {str(found["id"]) for found in page.attributes("figure")} == {f"figure-{name}" for name in _FIGURES}
    # Drawn for the eye, and said for the ear.
    assert "mathdefault" not in page.text, "a formula of matplotlib's is shown as it is written"
    drawings = [found for found in page.attributes("svg") if "viewbox" in found]
    assert len(drawings) == len(_FIGURES)
    assert all(found["role"] == "img" and len(str(found["aria-label"])) > 40 for found in drawings)
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    for name in _FIGURES:
        assert (full / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (full / "figures" / f"{name}.svg").read_text(encoding="utf-8")


def test_the_page_needs_nothing_else_and_escapes_names(full: Path) -> None:
    text = (full / "report.html").read_text(encoding="utf-8")
    page = _Page(full / "report.html")
    assert {"script", "link", "img", "image", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    for tag, found in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (found.get(name) or "#").startswith("#"), (tag, found)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    (policy,) = [found["content"] for found in page.attributes("meta") if "http-equiv" in found]
    assert str(policy).startswith("default-src 'none'")
    # The task's name is text wherever it stands, and no element.
    assert "b" not in {tag for tag, _ in page.tags}
    assert _TASK in page.text
    assert escape(_TASK) in text


def test_the_numbers_are_those_of_the_results(full: Path, checkpoint: Path, stored: dict[str, Path]) -> None:
    text = _Page(full / "report.html").text
    (entry,) = json.loads(stored["perplexity"].read_text())["models"]
    for side in ("dense", "sparse"):
        assert f"{entry[side]['perplexity']:.3f}" in text
    assert f"{100 * entry['realised_sparsity']:.1f}%" in text
    speed = json.loads(stored["speed"].read_text())
    assert speed["statement"] in text
    for point in json.loads((stored["sweep"] / FRONTIER).read_text())["points"]:
        assert f"{point['perplexity']:.3f}" in text
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert config["calibration"]["sha256"] in text
    for name in config["linears"]:
        assert name in text
    counted = json.loads(stored["activations"].read_text())
    densities = [linear["density"] for linear in counted["activations"].values()]
    for linear in counted["activations"].values():
        above = sum(linear["histogram"][30:])
        # What lies right of the threshold is what is kept, up to the bin that the threshold is in.
        assert abs(above - linear["density"]) < 0.1
    assert min(densities) <= min(counted["sparsity_by_position"]) <= 1.0


def test_without_results_the_commands_are_named(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "tiny-50")
    result = run("report", folder)
    assert (result.exit_code, result.stderr) == (0, "")
    page = _Page(tmp_path / "tiny-50-report" / "report.html")
    assert {found["id"] for found in page.attributes("section")} == _SECTIONS
    assert {str(found["id"]) for found in page.attributes("figure")} == {
        f"figure-heatmap-{name}" for name in ("sparsity", "density", "rank", "error")
    }
    for command in (f"sparsify eval {folder} --save", f"sparsify bench {folder} --save", "sparsify measure"):
        assert command in page.text
        assert command in result.stdout
    # Once more: the report is replaced, and nothing of an unfinished one is left.
    assert run("report", folder).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-50", "tiny-50-report"]


@pytest.mark.parametrize("kind", ["perplexity", "tasks", "speed", "crossover", "activations"])
def test_results_of_another_checkpoint_are_refused(
    run: Run, checkpoint: Path, stored: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    other = tmp_path / "other.json"
    data = json.loads(stored[kind].read_text())
    for entry in data.get("models", [data]):
        entry["checkpoint_sha256"] = "0" * 64
    other.write_text(json.dumps(data))
    _refused(run, checkpoint, other, tmp_path, "not about")


@pytest.mark.parametrize("kind", ["ppl-p", "comparison", "sweep"])
def test_results_of_another_dense_model_are_refused(
    run: Run, checkpoint: Path, stored: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    other = tmp_path / "other.json"
    text = (stored[kind] / FRONTIER if stored[kind].is_dir() else stored[kind]).read_text()
    other.write_text(re.sub(r'"model_sha256": ?"\w+"', f'"model_sha256": "{"0" * 64}"', text))
    _refused(run, checkpoint, other, tmp_path, "not about")


@pytest.mark.parametrize(
    "text", ["{}", "[]", "no json", '{"models": [1], "protocol": 1}', '{"sides": {}, "ratios": 1}']
)
def test_what_is_no_result_is_refused(run: Run, checkpoint: Path, tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.json"
    other.write_text(text)
    _refused(run, checkpoint, other, tmp_path, "other.json")


def test_a_result_that_lacks_something_is_refused(
    run: Run, checkpoint: Path, stored: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    data = json.loads(stored["perplexity"].read_text())
    del data["models"][0]["sparse"]["bits_per_byte"]
    other.write_text(json.dumps(data))
    _refused(run, checkpoint, other, tmp_path, "bits_per_byte")


def _refused(run: Run, checkpoint: Path, other: Path, tmp_path: Path, said: str) -> None:
    result = run("report", checkpoint, "--out", tmp_path / "report", "--results", other)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "other.json" in line
    assert said in line
    assert not (tmp_path / "report").exists()


def test_a_folder_with_other_files_is_not_replaced(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    result = run("report", checkpoint, "--out", tmp_path)
    assert result.exit_code == 2
    assert "thesis.txt" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "x"


def test_a_dense_model_has_no_report(run: Run, dense_model: Path, tmp_path: Path) -> None:
    result = run("report", dense_model, "--out", tmp_path / "report")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "sparsify convert" in result.stderr


def test_the_card_gets_the_numbers_and_stays_sound(
    run: Run, checkpoint: Path, stored: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "tiny-50")
    before = (folder / "README.md").read_text()
    flags = ["--out", tmp_path / "report", "--card", "--results", stored["perplexity"], "--results", stored["tasks"]]
    for _ in range(2):
        # The second time over the first: results stay those of this checkpoint, and the section is replaced.
        result = run("report", folder, *flags)
        assert result.exit_code == 0, result.output
        card = (folder / "README.md").read_text()
        assert card.startswith(before.rstrip("\n"))
        assert card.count("## Results") == 1
        (entry,) = json.loads(stored["perplexity"].read_text())["models"]
        assert f"sparse {entry['sparse']['perplexity']:.3f}" in card
        assert "sparsify eval FOLDER --text" in card
        assert "acc, every-token, 4 documents | dense " in card
        assert "<b>" not in card.partition("Measured again")[0]
        assert run("verify", folder).exit_code == 0
    # Other damage is still found.
    (folder / "sparsify.yaml").write_text("model: x\n")
    run("report", folder, *flags)
    assert "sparsify.yaml" in run("verify", folder).output


def test_a_card_without_numbers_is_refused(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "tiny-50")
    result = run("report", folder, "--out", tmp_path / "report", "--card")
    assert result.exit_code == 2
    assert "--results" in result.stderr
    assert run("verify", folder).exit_code == 0


_LOOK = """
const found = {overflow: 0, figures: 0, cut: [], overlap: []};
const page = document.querySelector("iframe").contentDocument;
found.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
for (const figure of page.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg"), frame = svg.getBoundingClientRect();
  found.figures += frame.width > 200 && frame.height > 50;
  const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  boxes.forEach(([words, box], index) => {
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 ||
        box.bottom > frame.bottom + 1) found.cut.push([figure.id, words]);
    for (const [others, other] of boxes.slice(index + 1)) {
      const wide = Math.min(box.right, other.right) - Math.max(box.left, other.left);
      const high = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
      if (wide > 2 && high > 0.3 * Math.min(box.height, other.height)) found.overlap.push([figure.id, words, others]);
    }
  });
}
document.title = JSON.stringify(found);
"""


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut_or_overlaps_in_a_browser(full: Path, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    # In a frame, as a window has a least width; the page itself runs no script.
    inner = escape((full / "report.html").read_text(encoding="utf-8"), quote=True)
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body><iframe srcdoc="{inner}" style="width:{width}px; height:900px; '
        f'border:0"></iframe><script>onload = () => {{ {_LOOK} }}</script>',
        encoding="utf-8",
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,1000"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *flags, profile, "--virtual-time-budget=5000", "--dump-dom", outer.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(\{.*?\})</title>", dom, re.DOTALL)
    assert title is not None, dom[:500]
    found = json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert found == {"overflow": 0, "figures": len(_FIGURES), "cut": [], "overlap": []}
