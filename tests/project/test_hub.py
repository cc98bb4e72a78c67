"""The hub's files agree with the worker's settings and the deployment, in the hub's form."""

from __future__ import annotations

import json

import hub
import pytest
from rest_api import POOLS as OF_THE_PLATFORM

from heimdex_clip_worker.cli.deploy import _EXCLUDED_GPUS, _GPU_POOLS, _MIN_CUDA, _OF_A_GPU
from heimdex_clip_worker.errors import SettingsError
from heimdex_clip_worker.serving.selftest import is_selftest
from heimdex_clip_worker.settings import VARIABLES, Settings

pytestmark = pytest.mark.model  # jsonschema comes with JupyterLab, which only the whole set-up has

HUB = json.loads((hub.FOLDER / "hub.json").read_text(encoding="utf-8"))
TESTS = json.loads((hub.FOLDER / "tests.json").read_text(encoding="utf-8"))
SECRET = "of-these-tests-4f1c9be27d03a856"
INPUTS = {entry["key"]: entry["input"] for entry in HUB["config"]["env"]}


def as_text(form: dict, value: object) -> str:
    """Write a value as the hub puts it into the environment."""
    return form["trueValue" if value else "falseValue"] if isinstance(value, bool) else str(value)


def test_the_files_are_what_the_tool_writes():
    assert (hub.hub(), hub.tests()) == (HUB, TESTS), "run `python tools/hub.py`"


def test_every_variable_is_an_input_unless_the_image_sets_it():
    names = {variable.name for variable in VARIABLES.values()}
    assert INPUTS.keys() == names - hub.image_variables()
    assert len(INPUTS) == len(HUB["config"]["env"])
    assert "EMBEDDING_HMAC_SECRET" in INPUTS


def test_the_defaults_are_those_of_the_worker():
    secret = {"EMBEDDING_HMAC_SECRET": SECRET}
    env = {k: as_text(i, i["default"]) for k, i in INPUTS.items() if "default" in i}
    assert Settings.from_env({**env, **secret}) == Settings.from_env({**secret, **_OF_A_GPU})
    assert INPUTS["CLIP_DEVICE"]["default"] == "cuda"


@pytest.mark.parametrize("key", INPUTS)
def test_an_input_offers_only_what_the_worker_accepts(key):
    form = INPUTS[key]
    assert form["type"] in {"string", "number", "boolean"} and form["name"]
    assert ("default" in form) != form.get("required", False)
    offered = [option["value"] for option in form.get("options", [])]
    offered += [form[bound] for bound in ("min", "max") if bound in form]
    offered += [True, False] if form["type"] == "boolean" else []
    keys = {"EMBEDDING_HMAC_SECRET": SECRET, "EMBEDDING_HMAC_KEYS": f"2026-11:{SECRET}"}
    for value in offered:
        Settings.from_env({**keys, key: as_text(form, value)})


def test_no_secret_has_a_default():
    for variable in VARIABLES.values():
        assert not (variable.hidden and INPUTS[variable.name].get("default"))


def test_the_listing_has_the_hubs_form():
    assert HUB["type"] == "serverless"
    assert HUB["category"] in {"audio", "embedding", "language", "video", "image"}
    config = HUB["config"]
    assert config["runsOn"] == "GPU" and type(config["containerDiskInGb"]) is int
    pools = [p for p in config["gpuIds"].split(",") if not p.startswith("-")]
    left_out = {p[1:] for p in config["gpuIds"].split(",") if p.startswith("-")}
    assert pools == list(_GPU_POOLS) and left_out == set(_EXCLUDED_GPUS)
    assert left_out < set().union(*(OF_THE_PLATFORM[pool] for pool in pools))
    assert config["allowedCudaVersions"][-1] == _MIN_CUDA
    for name in ["Dockerfile", "README.md"]:
        assert (hub.ROOT / name).is_file()
    assert (hub.FOLDER / "handler.py").is_file()  # which the hub requires


def test_the_test_is_the_selftest_and_starts_a_worker():
    [case] = TESTS["tests"]
    assert is_selftest(case["input"])
    env = {entry["key"]: entry["value"] for entry in TESTS["config"]["env"]}
    settings = Settings.from_env(env)
    assert (settings.selftest, settings.device) == ("on", "cuda")


def test_the_public_secret_of_the_tests_is_no_secret_elsewhere():
    env = {entry["key"]: entry["value"] for entry in TESTS["config"]["env"]}
    del env["ALLOWED_IMAGE_HOSTS"]
    for change in ({}, {"ALLOWED_IMAGE_HOSTS": "hub-tests.invalid,a.example"}):
        with pytest.raises(SettingsError, match="is public"):
            Settings.from_env(env | change)
