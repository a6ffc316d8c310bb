"""The examples, and the files that launch them in several processes."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_launch_files_are_what_accelerate_reads(name, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.chdir(EXAMPLES.parent)
    file = EXAMPLES / "launch" / f"{name}.yaml"
    assert f"--config_file examples/launch/{name}.yaml" in file.read_text()
    parsed = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    arguments, *_ = _validate_launch_command(parsed)
    assert arguments.num_processes == 2
    found = (bool(arguments.multi_gpu), bool(arguments.use_fsdp), bool(arguments.use_deepspeed))
    assert found == tuple(name == kind for kind in ("ddp", "fsdp2", "zero3"))
    for option, value in _options(file).items():
        assert getattr(arguments, option) in (value, str(value), str(value).lower())
    if arguments.use_deepspeed:
        settings = json.loads(Path(arguments.deepspeed_config_file).read_text())
        assert settings["zero_optimization"]["stage"] == 3


def _options(file):
    import yaml

    content = yaml.safe_load(file.read_text())
    return {**content.get("fsdp_config", {}), **content.get("deepspeed_config", {})}
