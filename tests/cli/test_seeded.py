"""Seeded weights, for machines without the real ones: both towers in every command."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from heimdex_clip_worker.cli import demo, embed, platform
from heimdex_clip_worker.cli.console import CommandError
from heimdex_clip_worker.errors import ModelError, SettingsError
from heimdex_clip_worker.model.golden import seeded_state
from heimdex_clip_worker.model.weights import check_model, text_weights
from heimdex_clip_worker.remote import local

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Weights as small as names allow; making the real ones takes seconds."""
    state = {"visual.proj": torch.ones(2), "token_embedding.weight": torch.ones(3)}
    monkeypatch.setattr("heimdex_clip_worker.model.golden.seeded_state", lambda: dict(state))
    return state


def names(path: str | Path) -> list[str]:
    """List the tensors in a file."""
    with safe_open(str(path), framework="pt") as file:
        return sorted(file.keys())


def through_platform(folder: Path) -> str:
    """Find the file that `platform --seeded` gives its workers."""
    parser = argparse.ArgumentParser()
    platform.add_arguments(parser)
    args = parser.parse_args(["--seeded", str(folder)])
    return platform.worker_variables(args)["CLIP_PRETRAINED"]


def through_demo(folder: Path) -> str:
    """Find the file that the demo gives its worker where the hub is out of reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "has_real_weights", lambda: False)
        return demo._choose_weights(folder)["CLIP_PRETRAINED"]


def through_embed(folder: Path) -> str:
    """Find the file that `embed --seeded` and `search --seeded` load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "LocalBackend", lambda settings, **_: settings)
        return embed._open_local(str(folder)).pretrained


each_command = pytest.mark.parametrize("find", [through_platform, through_demo, through_embed])


@each_command
def test_a_seeded_file_has_both_towers(find, tmp_path, state) -> None:
    path = find(tmp_path / "new")
    assert names(path) == sorted(state)
    assert check_model("ViT-B-32", path) == []  # it says its activation


@each_command
def test_a_file_of_a_version_without_a_text_tower_is_made_anew(find, tmp_path, state) -> None:
    old = {"visual.proj": torch.zeros(2)}
    facts = {"format": "pt", "activation": "quickgelu"}
    save_file(old, tmp_path / "seeded.safetensors", metadata=facts)
    assert names(find(tmp_path)) == sorted(state)


def test_a_damaged_file_is_made_anew_and_a_good_one_is_kept(tmp_path, state) -> None:
    path = tmp_path / "seeded.safetensors"
    path.write_bytes(b"half a fi")
    assert names(demo.seeded_checkpoint(tmp_path)) == sorted(state)
    before = path.stat().st_ino, path.stat().st_mtime_ns
    demo.seeded_checkpoint(tmp_path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_seeded_weights_are_those_of_both_towers() -> None:
    state = seeded_state()
    assert len(text_weights(state)) == 149 and state["visual.proj"].shape == (768, 512)


def test_the_worker_of_the_platform_gets_a_key_that_it_accepts(capsys) -> None:
    parser = argparse.ArgumentParser()
    platform.add_arguments(parser)
    with pytest.raises(SettingsError, match="EMBEDDING_HMAC_KEYS is missing"):
        platform.run(parser.parse_args(["--env", "AUTH_ACCEPT_V1=false", "--", "true"]))


def test_weights_that_cannot_be_had_name_the_option(monkeypatch) -> None:
    def load(settings: object, **_: object) -> None:
        raise ModelError("the hub does not answer")

    monkeypatch.setattr(local, "LocalBackend", load)
    monkeypatch.delenv("CLIP_PRETRAINED", raising=False)
    with pytest.raises(CommandError, match=r"the hub does not answer\. .+ add --seeded FOLDER"):
        embed._open_local()
    monkeypatch.setenv("CLIP_PRETRAINED", "laion2b_s34b_b79k")
    with pytest.raises(ModelError):
        embed._open_local()
