"""Layouts and presets: the published numbers, and files of the user's with their mistakes named."""

from pathlib import Path

import pytest

from manifold_cl.continual import make_method
from manifold_cl.files import FileError
from manifold_cl.streams import RULES, Layout, Preset, published_layout, read_layout
from manifold_cl.streams.layout import PUBLISHED
from manifold_cl.streams.scorers import CAPTIONS

MINIMAL = """
name = "mine"
targets = "language.*"
[[tasks]]
name = "one"
train = ["train.json"]
test = ["test.json"]
scorer = "exact"
"""


def test_the_published_streams_have_their_tasks_in_order_with_their_scorers() -> None:
    ucit = {task.name: task.scorer for task in published_layout("ucit").tasks}
    assert ucit == {
        "ImageNet-R": "exact",
        "ArxivQA": "exact",
        "VizWiz": CAPTIONS,
        "IconQA": "exact",
        "CLEVR-Math": "exact",
        "Flickr30k": CAPTIONS,
    }
    dcl = {task.name: task.rules for task in published_layout("mllm-dcl").tasks}
    assert list(dcl) == ["RS", "Med", "AD", "Sci", "Fin"]
    assert dcl["Sci"] == {"mapqa": "listed", "": "exact_answered"}
    assert [dcl[name][""] for name in ("RS", "Med", "AD", "Fin")] == [
        *("contained_word", "contained", "contained_word", "compact"),
    ]
    assert {rule for rules in dcl.values() for rule in rules.values()} <= set(RULES)


def test_the_published_presets_are_the_published_numbers() -> None:
    ucit, dcl = (published_layout(name).preset("published") for name in PUBLISHED)
    names = ("rank", "alpha", "lr", "scale_lr", "initial_scale")
    assert [ucit.options[name] for name in names] == [16, 32.0, 2e-4, 2e-4, 0.0]
    assert [dcl.options[name] for name in names] == [32, 160.0, 2e-5, 2e-5, -0.002]
    assert (ucit.options["scale_decay"], dcl.options["initial_scale_last"]) == (0.1, -0.008)
    for preset in (ucit, dcl):
        assert (preset.options["energy"], preset.options["source"], preset.options["step"]) == (
            *(0.99, "gradient", "official"),
        )
    first, second = ucit.training_for(4), dcl.training_for(4)
    assert (first.epochs, first.batch_size, first.accumulation) == ((3, 1, 3, 3, 3, 1), 8, 2)
    assert [2e-4 * first.rate_of(task) for task in range(6)] == pytest.approx([2e-4] * 5 + [2e-5])
    assert (second.epochs, second.batch_size, second.accumulation) == ((3, 3, 1, 2, 1), 16, 2)
    assert {(t.warmup, t.clip) for t in (first, second)} == {(0.03, 1.0)}
    assert ucit.additional_parameters().lr == (2e-5, 2e-5, 2e-5, 2e-5, 2e-5, 5e-6)
    assert (ucit.additional_parameters().weight_decay, dcl.additional_parameters().lr) == (0.1, 2e-5)


PRESET = "total_batch = 8\noptions = {}\ntraining = {}\n"


@pytest.mark.parametrize("stream", sorted(PUBLISHED))
def test_every_preset_is_taken_by_its_method_and_fits_its_tasks(stream: str) -> None:
    layout = published_layout(stream)
    for preset in layout.presets.values():
        options = make_method(preset.method, **preset.options).options()
        assert {key: options[key] for key in preset.options} == dict(preset.options)
        preset.training_for().validate_tasks(len(layout.tasks))
        assert preset.deviations
    few = layout.preset("published", tasks=[task.name for task in layout.tasks[:2][::-1]])
    assert few.training_for().epochs == tuple(layout.preset("published").training["epochs"][i] for i in (1, 0))


def test_the_total_batch_stays_over_any_number_of_ranks() -> None:
    preset = Preset("eblora", 64, {}, {"batch_size": 8})
    made = [preset.training_for(ranks) for ranks in (1, 2, 4, 8)]
    assert [t.batch_size * t.accumulation * ranks for t, ranks in zip(made, (1, 2, 4, 8), strict=True)] == [64] * 4
    assert preset.training_for(4, batch_size=16).accumulation == 1
    with pytest.raises(ValueError, match=r"3 ranks of 8 examples do not divide the total batch of 64: choose another"):
        preset.training_for(3)
    with pytest.raises(ValueError, match=r"16 ranks of 8 examples do not divide"):
        preset.training_for(16)
    with pytest.raises(ValueError, match="the preset does not say how the projector trains"):
        preset.additional_parameters()


def test_a_layout_of_the_users_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL + 'image_roots = ["pictures"]\ntext_only = true\n')
    layout = read_layout(path)
    assert isinstance(layout, Layout)
    (task,) = layout.tasks
    assert (task.name, task.train, layout.roots(task), task.text_only) == ("one", ("train.json",), ("pictures",), True)
    assert layout.max_new_tokens == 1024


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name = ", r"mine\.toml is not a TOML file: "),
        ('name = "x"\ntargets = "y"', r"mine\.toml lists no \[\[tasks\]\]"),
        (MINIMAL + "colour = 1", r"task 'one': unknown key 'colour'.*have: name, train"),
        (MINIMAL.replace('"exact"', '"exakt"'), r"task 'one': unknown scorer 'exakt', did you mean exact"),
        (MINIMAL.replace('train = ["train.json"]', ""), r"task 'one' lacks train"),
        ("max_lenght = 3\n" + MINIMAL, r"the stream: unknown key 'max_lenght', did you mean max_length"),
        ('aspect = "squash"\n' + MINIMAL, r"aspect is 'pad' or 'crop', got 'squash'"),
        (MINIMAL + '[presets.p]\nmethod = "eblora"', r"preset 'p' lacks total_batch, options, training"),
        (
            MINIMAL + '[presets.p]\nmethod = "eblora"\ntotal_batch = 8\noptions = {}\ntraining = { epoch = 1 }',
            r"preset 'p', training: unknown key 'epoch', did you mean epochs",
        ),
        (MINIMAL.replace('"train.json"', '"/etc/passwd"'), r"task 'one', train: '/etc/passwd' leaves the folder"),
        (MINIMAL.replace('"train.json"', '"a/../../b.json"'), r"train: 'a/\.\./\.\./b\.json' leaves the folder"),
        (MINIMAL.replace('"train.json"', '"C:/b.json"'), r"train: 'C:/b\.json' leaves the folder"),
        (MINIMAL.replace('["train.json"]', '"train.json"'), r"task 'one', train is a list of paths, got 'train\.json'"),
        (MINIMAL + 'image_roots = [".."]', r"task 'one', image_roots: '\.\.' leaves the folder"),
        ('image_roots = ["/data"]\n' + MINIMAL, r"image_roots: '/data' leaves the folder with the data: .* a link"),
        (
            MINIMAL.replace('"language.*"', '"lang(uage"'),
            r"targets is a regular expression, got 'lang\(uage'",
        ),
        (MINIMAL.replace('"language.*"', "3"), r"targets is a regular expression, got 3"),
        (MINIMAL.replace('"one"', '"../one"'), r"the name of a task is part of a folder's name.*'\.\./one'"),
        (MINIMAL.replace('"one"', '"one\\u0007"'), r"the name of a task is .* control character.*'one\\x07'"),
        (MINIMAL + '[presets."../p"]\nmethod = "eblora"\n' + PRESET, r"the name of a preset is .*'\.\./p'"),
        (MINIMAL.replace("[[tasks]]", "presets = 3\n[[tasks]]"), r"presets are tables \[presets\.NAME\], got 3"),
        (
            MINIMAL.replace('"exact"', '"captions"') + 'subset_scorers = { a = "exact" }',
            r"task 'one': captions are scored together",
        ),
    ],
)
def test_mistakes_in_a_layout_are_named_with_the_file(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(FileError, match=said):
        read_layout(path)


def test_unknown_names_come_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown stream 'ucti', did you mean ucit\? \(have: ucit, mllm-dcl\)"):
        published_layout("ucti")
    with pytest.raises(ValueError, match=r"stream 'ucit': unknown preset 'publish', did you mean published"):
        published_layout("ucit").preset("publish")
    with pytest.raises(ValueError, match=r"stream 'ucit': unknown task 'VizWz', did you mean VizWiz"):
        published_layout("ucit").preset("published", tasks=["VizWz"])
    with pytest.raises(FileError, match=r"none\.toml does not exist"):
        read_layout(tmp_path / "none.toml")
