# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

import vovnet_d2
from vovnet_d2.engine import argument_parser, load_config, pretrain
from vovnet_d2.engine.config import find_config
from vovnet_d2.engine.lazy import lazy_argument_parser

pytestmark = pytest.mark.usefixtures("yaml_in_python")

RETINANET = "COCO-Detection/retinanet_V_39_eSE_FPN_3x.yaml"
PARSERS = {
    "train_net": argument_parser,
    "pretrain_net": pretrain.argument_parser,
    "lazyconfig_train_net": lazy_argument_parser,
}


def write(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text)
    return str(path)


def test_options_overwrite_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "SOLVER: {BASE_LR: 0.5, MAX_ITER: 7}\nVERSION: 2\n")
    cfg = load_config(path, ["SOLVER.MAX_ITER", "9"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.5, 9)
    assert cfg.SOLVER.IMS_PER_BATCH == load_config().SOLVER.IMS_PER_BATCH


def test_a_shipped_config_is_found_by_its_name() -> None:
    by_path = load_config(vovnet_d2.get_config_file(RETINANET))
    assert load_config(RETINANET) == by_path
    assert by_path.MODEL.META_ARCHITECTURE == "RetinaNet"


def test_python_tags_run_only_where_allowed(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    tag = f"!!python/object/apply:os.mkdir ['{marker}']"
    path = write(tmp_path, f"OUTPUT_DIR: {tag}\nVERSION: 2\n")
    with pytest.raises(ValueError, match=r"python/object/apply:os.mkdir.*--allow-unsafe-yaml"):
        load_config(path)
    assert not marker.exists()
    anchors = write(tmp_path, 'SEED: !!python/object/apply:eval ["6 * 7"]\nVERSION: 2\n')
    assert load_config(anchors, allow_unsafe_yaml=True).SEED == 42


def test_python_tags_in_a_base_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text('SEED: !!python/object/apply:eval ["6 * 7"]\n')
    with pytest.raises(ValueError, match="--allow-unsafe-yaml"):
        load_config(write(tmp_path, "_BASE_: base.yaml\nVERSION: 2\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {VOVNET: {CONV_BODI: V-39}}\nVERSION: 2\n", r"VOVNET.CONV_BODI\. .*CONV_BODY"),
        ("SOLVER: {BASE_LR: fast}\nVERSION: 2\n", r"my\.yaml .*SOLVER.BASE_LR"),
        ("SOLVER: {BASE_LR: [\nVERSION: 2\n", r"my\.yaml is not valid YAML: .*line 3"),
        ("_BASE_: gone.yaml\nVERSION: 2\n", r"my\.yaml inherits .*gone\.yaml, which does not"),
        ("- SOLVER\n", r"my\.yaml does not fit"),
        ("", r"my\.yaml does not fit"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((FileNotFoundError, KeyError, ValueError), match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in caught.value.args[0]


def test_a_missing_file_names_similar_files() -> None:
    with pytest.raises(FileNotFoundError, match=r"retinanet_V_39_eSE_FPN_3x\.yaml"):
        load_config("COCO-Detection/retinanet_V39_eSE_FPN_3x.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.BASE_LR"], "pairs of KEY and VALUE, but the number of words is 1: SOLVER"),
        (["SOLVER.BASE_LR=1"], "Write SOLVER.BASE_LR 1 for a YAML file"),
        (["SEED", "1", "SOLVER.STEPS=(1, 2)", "x"], r"Write SOLVER.STEPS \(1, 2\) for a YAML"),
        (["SOLVER.BASE_LRR", "1"], r"key: SOLVER.BASE_LRR\. Close to it: .*'SOLVER.BASE_LR'"),
        (["SOLVER.BASE_LR.X", "1"], r"key: SOLVER.BASE_LR.X\. Close"),
        (["SOLVER", "1"], "key: SOLVER"),
        (["SOLVER.MAX_ITER", "many"], r"many: the value must be a whole number, such as \d+\.$"),
        (["SOLVER.STEPS", "(1,"], r"Config option SOLVER.STEPS \(1,: .* in round brackets, such"),
        (["MODEL.MASK_ON", "yes"], r"MODEL.MASK_ON yes: the value must be True or False\.$"),
        (["SOLVER.BASE_LR", "1"], r"1: .* a number with a decimal point, such as 0\.001\.$"),
        (["MODEL.WEIGHTS", "5"], r"5: the value must be text\. Write \"'5'\" for the text 5\.$"),
        (["MODEL.DEVICE", "['a']"], r"\['a'\]: the value must be text, such as 'c[a-z]+'\.$"),
        (["SEED", "1", "--resume"], "--resume stands among the config options"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        load_config("", options)


def test_the_options_that_messages_give_as_examples_are_taken() -> None:
    cfg = load_config("", ["SOLVER.BASE_LR", "0.001", "MODEL.WEIGHTS", "'5'"])
    assert (cfg.SOLVER.BASE_LR, cfg.MODEL.WEIGHTS) == (0.001, "5")


def test_every_argument_is_explained() -> None:
    parser = argument_parser()
    assert all(action.help for action in parser._actions)
    args = parser.parse_args(["--auto-scale-lr", "--allow-pickle", "SOLVER.IMS_PER_BATCH", "2"])
    assert args.auto_scale_lr
    assert args.allow_pickle
    assert not args.allow_partial
    assert not args.allow_unsafe_yaml
    assert args.opts == ["SOLVER.IMS_PER_BATCH", "2"]


@pytest.mark.parametrize("tool", sorted(PARSERS))
def test_the_help_names_the_tool_and_how_to_resume(tool: str) -> None:
    """Check the sentence on --resume and the form of the commands, unlike in Detectron2."""
    parser = PARSERS[tool]()
    assert parser.parse_args(["--resume"]).resume
    assert not parser.parse_args([]).resume
    text = parser.format_help()
    assert text.count("go on from the last checkpoint in OUTPUT_DIR") == 1
    assert "resume_or_load" not in text
    commands = [line.split()[1:3] for line in text.splitlines() if line.strip().startswith("$")]
    assert len(commands) >= 2
    assert all(command == ["python", f"tools/{tool}.py"] for command in commands)


def test_similar_names_to_a_missing_file_are_searched_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Close to it: 'output/config\.yaml'"):
        find_config("output/confg.yaml")
    (tmp_path / "output" / "link.yaml").symlink_to("gone.yaml")
    with pytest.raises(FileNotFoundError, match=r"no config file output/link\.yaml\.$"):
        find_config("output/link.yaml")
    with pytest.raises(FileNotFoundError, match=r"mask_rcnn_V_39_eSE_FPN_3x\.yaml"):
        find_config("COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_3.yaml")
