"""The kanji experiment: fonts by design, natural counts, metrics by closed forms, a run."""

import json

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("fontTools")
pytest.importorskip("wordfreq")
pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from support.font import make_font

from cbloss_fused import class_balanced_weights, ldam_margin, logit_adjustment
from cbloss_fused.experiments import fonts, kanji, kanji_data
from cbloss_fused.experiments.evaluation import (
    bin_sums,
    by_bin,
    calibration_error,
    evaluate,
    mean_and_deviation,
)
from cbloss_fused.experiments.kanji_figures import FIGURES, draw_figures
from cbloss_fused.experiments.kanji_tables import results_table
from cbloss_fused.experiments.long_tail import frequency_groups
from cbloss_fused.experiments.settings import ALL_SETTINGS, SETTINGS

DESIGNS = 13  # four of them held out


@pytest.fixture(autouse=True)
def torch_state():
    """A run sets the seed, the number of threads and how denormal numbers are treated."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def characters():
    return "".join(kanji_data.kanji_frequencies()[0][:300])


@pytest.fixture(scope="session")
def folder(tmp_path_factory, characters):
    """Fonts of thirteen designs: a, b, ... m."""
    folder = tmp_path_factory.mktemp("fonts")
    for i in range(DESIGNS):
        name = chr(ord("a") + i)
        make_font(folder / name / f"{name}.ttf", characters + fonts.SAMPLE, design=i)
    return folder


@pytest.fixture
def data(folder, tmp_path):
    return kanji_data.load_kanji(kanji_data.render_kanji(folder, tmp_path, samples=400))


def test_every_third_design_is_held_out(folder):
    faces = fonts.find_faces(folder)
    assert [face.design for face in faces] == list("abcdefghijklm")
    assert [face.design for face in faces if face.held_out] == list("behk")


def test_one_design(folder, tmp_path, characters):
    """A folder's faces and near copies are one design, of copies one is kept."""
    text = characters + fonts.SAMPLE
    for i in range(DESIGNS):
        make_font(tmp_path / str(i) / f"{i:02}.ttf", text, design=i)
    make_font(tmp_path / "0" / "00-other.ttf", text, design=50)
    make_font(tmp_path / "1" / "01-black.ttf", text, design=1, weight=160)
    make_font(tmp_path / "copies" / "zz.ttf", text, design=2)
    make_font(tmp_path / "lacks" / "lacks.ttf", characters[:9], design=20)
    make_font(tmp_path / "empty" / "empty.ttf", text[:-1], design=21, empty=text[-1])
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    (tmp_path / "link.ttf").symlink_to(tmp_path / "3" / "03.ttf")
    designs: dict[str, list[str]] = {}
    for face in fonts.find_faces(tmp_path):
        designs.setdefault(face.design, []).append(face.path.stem)
    assert len(designs) == DESIGNS
    # "00-other" is before "00" in the order of names, and the design has the first one's name.
    assert designs["00-other"] == ["00-other", "00"]
    assert designs["01-black"] == ["01-black", "01"]
    assert designs["02"] == ["02"]


@pytest.mark.parametrize("few", [0, fonts.FEWEST_DESIGNS - 1])
def test_too_few_fonts(tmp_path, characters, few):
    for i in range(few):
        make_font(tmp_path / str(i) / f"{i}.ttf", fonts.SAMPLE, design=i)
    with pytest.raises(
        ValueError, match=rf"at least 9 designs .*found {few} in {few} files; on Deb"
    ):
        fonts.find_faces(tmp_path)


def test_frequencies_are_those_of_japanese():
    characters, p = kanji_data.kanji_frequencies()
    assert {"人", "日", "一"} <= set(characters[:10])
    assert len(characters) == len(set(characters)) > 4000
    assert (p[:-1] >= p[1:]).all()
    assert p.sum() == pytest.approx(1)


def test_counts_are_natural(data, characters):
    C = len(data.counts)
    assert data.train_x.shape == (len(data.train_y), 1, 32, 32)
    assert data.test_x.shape == (4 * C, 1, 32, 32)
    assert torch.equal(torch.bincount(data.train_y, minlength=C), data.counts)
    assert data.counts.tolist() == sorted(data.counts.tolist(), reverse=True)
    assert data.counts.min() >= 1
    assert set(data.characters) <= set(characters) and len(set(data.characters)) == C
    assert torch.equal(torch.bincount(data.test_y), torch.full((C,), 4))
    share = kanji_data.kanji_frequencies()[1][0]  # the most frequent character's
    assert data.counts[0] <= 400 * share + 5 * (400 * share) ** 0.5


def test_designs_of_the_test_are_never_trained_on(folder, data):
    """A class's test images are the held-out designs' drawings, in their order."""
    from PIL import ImageFont

    held_out = [face for face in fonts.find_faces(folder) if face.held_out]
    for c in (0, len(data.counts) - 1):
        shown = data.test_x[data.test_y == c, 0]
        for image, face in zip(shown, held_out, strict=True):
            font = ImageFont.truetype(face.path, fonts.SIZE)
            drawn = kanji_data._reduced(fonts.draw(data.characters[c], font))
            assert (image.numpy() == drawn).all()


def test_rendered_once(folder, tmp_path, monkeypatch):
    path = kanji_data.render_kanji(folder, tmp_path, 300)
    assert kanji_data.render_kanji(folder, tmp_path, 300) == path
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    fewer = kanji_data.render_kanji(folder, tmp_path, 300, most_classes=20)
    assert fewer != path
    whole, part = kanji_data.load_kanji(path), kanji_data.load_kanji(fewer)
    assert torch.equal(part.counts, whole.counts[:20])
    assert part.characters == whole.characters[:20]
    monkeypatch.setattr(kanji_data, "_render", None)
    assert kanji_data.render_kanji(folder, tmp_path, 300) == path


def test_groups_and_bins():
    counts = torch.tensor([0, 1, 2, 3, 5, 6, 20, 21, 100, 101, 200, 201, 900])
    assert by_bin(counts).tolist() == [0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 7, 8, 8]
    groups = {name: counts[mask].tolist() for name, mask in frequency_groups(counts).items()}
    assert groups["many"] == [101, 200, 201, 900] and groups["medium"] == [21, 100]
    assert groups["few"] == [1, 2, 3, 5, 6, 20] and groups["one"] == [1]
    assert groups["all"] == counts[1:].tolist()
    sums = bin_sums(torch.arange(13), counts)
    assert sums.tolist() == [1, 2, 7, 5, 6, 7, 8, 19, 23]


def test_evaluation():
    """Three classes with 200, 30 and 1 training images; two, one and one test images."""
    counts, target = torch.tensor([200, 30, 1]), torch.tensor([0, 0, 1, 2])
    probability = torch.tensor([[0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.1, 0.9, 0.0], [0.5, 0.2, 0.3]])
    result = evaluate(probability, target, counts)  # right, wrong, right, wrong
    assert result.groups == pytest.approx(
        {"all": 50.0, "many": 50.0, "medium": 100.0, "few": 0.0, "one": 0.0}
    )
    assert result.bins == [0.0, None, None, None, None, 100.0, None, 50.0, None]
    assert result.natural == pytest.approx(100 * (0.5 * 200 + 30) / 231)
    # Each image is alone in its bin of confidence: 0.6 is 9/15, 0.8 12/15, 0.9 13.5/15, 0.5 7.5/15.
    assert result.ece == pytest.approx(100 * (0.5 * 0.4 + 0.5 * 0.8 + 0.1 + 0.5) / 3, rel=1e-6)
    natural = 100 * (100 * 0.4 + 100 * 0.8 + 30 * 0.1 + 1 * 0.5) / 231
    assert result.natural_ece == pytest.approx(natural, rel=1e-6)


def test_classes_without_a_test_image_count_nowhere():
    probability = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    result = evaluate(probability, torch.tensor([0, 0]), torch.tensor([5, 50]))
    assert result.groups == {"all": 100.0, "many": None, "medium": None, "few": 100.0, "one": None}
    assert (result.natural, result.ece, result.natural_ece) == (100, 25, 25)


def test_calibration_error_of_certain_and_of_mixed_bins():
    ones = torch.ones(2)
    assert calibration_error(ones, ones, ones) == 0
    assert calibration_error(ones, torch.tensor([1.0, 0.0]), ones) == 50
    assert calibration_error(ones, torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0])) == 25


def test_fifteen_settings():
    assert len(SETTINGS) == 15
    assert len({setting.title for setting in ALL_SETTINGS.values()}) == len(ALL_SETTINGS)


@pytest.mark.parametrize("name", ALL_SETTINGS)
def test_losses_of_the_settings(name):
    counts, setting = torch.tensor([120, 30, 4, 1]), ALL_SETTINGS[name]
    loss_fn, schedule = setting.make_loss(counts, epochs=10)
    options = loss_fn.options
    weight = class_balanced_weights(counts, setting.options["beta"])
    assert options.activation == ("sigmoid" if "sigmoid" in name or "focal" in name else "softmax")
    assert options.gamma == (0.5 if "focal" in name else 0)
    assert (schedule is not None) == name.endswith("drw")
    if schedule is not None:
        for _ in range(7):
            assert torch.equal(loss_fn.weight, torch.ones(4))
            schedule.step()
    torch.testing.assert_close(loss_fn.weight, weight)
    assert (setting.options["beta"] == 0) == (not name.startswith(("cb-", "ldam")))
    if name == "logit-adjustment":
        torch.testing.assert_close(loss_fn.logit_bias, logit_adjustment(counts))
    else:
        assert loss_fn.logit_bias is None
    if name == "ldam-drw":
        torch.testing.assert_close(loss_fn.margin, ldam_margin(counts))
    else:
        assert loss_fn.margin is None
    assert options.logit_scale == (30 if name in ("ldam-drw", "cosine") else 1)


def test_heads():
    x = torch.randn(5, 8)
    sigmoid = SETTINGS["cb-focal-0.99"].make_head(8, 100)
    torch.testing.assert_close(sigmoid.get_parameter("bias").sigmoid(), torch.full((100,), 0.01))
    cosine = SETTINGS["ldam-drw"].make_head(8, 4)
    expected = torch.nn.functional.cosine_similarity(
        x.unsqueeze(1), cosine.get_parameter("weight").unsqueeze(0), 2
    )
    torch.testing.assert_close(cosine(x), expected)


def test_learning_rate():
    rates = [kanji.rate_factor(batch, batches=10, epochs=8) for batch in range(80)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:50] == [1] * 40  # the loss is re-weighted from epoch int(0.7 * 8) on
    assert rates[50:70] == pytest.approx([0.1] * 20)
    assert rates[70:] == pytest.approx([0.01] * 10)


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 3.0]) == "2.0 ± 1.4"
    assert mean_and_deviation([2.0]) == "2.0"
    assert mean_and_deviation([None, None]) == "-"


def test_experiment(folder, tmp_path, capsys, monkeypatch):
    losses = ["cross-entropy", "cb-focal-0.9999-drw", "ldam-drw"]
    command = ["--fonts", str(folder), "--cache", str(tmp_path / "cache"), "--losses", *losses]
    command += ["--output", str(tmp_path / "out"), "--samples", "300", "--classes", "30"]
    command += ["--epochs", "2", "--workers", "1", "--seeds", "2"]
    kanji.main(command)
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    names = {f"{name}.{end}" for name in FIGURES for end in ("png", "svg")} | {"sample.png"}
    assert {p.name for p in out.iterdir()} == names | {"runs.jsonl", "results.md", "counts.csv"}
    header, *lines = (out / "counts.csv").read_text("utf-8").splitlines()
    assert header == "kanji,count" and len(lines) == 30
    records = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [(r["loss"], r["seed"]) for r in records] == [(n, s) for s in (0, 1) for n in losses]
    for record in records:
        assert len(record["history"]) == 2
        for shares in record["history"]:
            assert sum(shares["loss"]) == pytest.approx(1, abs=1e-4)
            assert sum(shares["gradient"]) == pytest.approx(1, abs=1e-4)
    assert results_table(records) in printed
    assert (out / "results.md").read_text() in printed
    assert "30 kanji" in printed and ALL_SETTINGS["ldam-drw"].title in printed

    monkeypatch.setattr(kanji, "train", None)  # nothing is left to train
    kanji.main(command)
    assert capsys.readouterr().out == printed


def test_figures_of_a_loss_that_they_do_not_show(tmp_path):
    shares = {"gradient": [1 / 9] * 9}
    groups = {"all": 50.0, "many": None, "medium": None, "few": 50.0, "one": None}
    record = {"loss": "sigmoid", "bins": [50.0] * 9, "groups": groups, "history": [shares] * 2}
    draw_figures([record], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 * len(FIGURES)


def test_training_lowers_the_loss_and_repeats(data, monkeypatch):
    monkeypatch.setattr(kanji, "BATCH", 32)
    setting = SETTINGS["cross-entropy"]
    runs = [kanji.train(setting, data, seed=3, epochs=8) for _ in range(2)]
    first, second = (model.state_dict() for model, _, _ in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model, loss_fn, _ = runs[0]
    p = kanji.probabilities(model, loss_fn, data.train_x)
    torch.testing.assert_close(p.sum(1), torch.ones(len(p)))
    of_target = p.gather(1, data.train_y.unsqueeze(1)).mean()
    assert of_target > 5 / len(data.counts)  # untrained it is about 1 / C


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--classes", "-3"], "--classes -3: expected at least 1"),
        (["--losses", "hinge"], "invalid choice: 'hinge'"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        kanji.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_no_fonts_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"expected fonts of at least 9 designs.*found 0 in 0"):
        kanji.main(["--fonts", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_fetching_without_debian(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^cannot fetch fonts \(.*apt-get.*fonts\.google\.com"):
        fonts.main([str(tmp_path)])


def test_fonts_that_are_there_are_not_fetched(folder, monkeypatch, capsys):
    monkeypatch.setattr(fonts, "fetch", None)
    fonts.main([str(folder)])
    assert capsys.readouterr().out.endswith("13 faces of 13 designs, 4 held out\n")
