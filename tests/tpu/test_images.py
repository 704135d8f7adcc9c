"""What cannot be built here is at least of files that are there, and installs what a slice gets."""

import pathlib
import re

import yaml

ROOT = pathlib.Path(__file__).parents[2]
DOCKERFILE = (ROOT / "tpu" / "Dockerfile").read_text()
SKY = yaml.safe_load((ROOT / "tpu" / "sky.yaml").read_text())


def test_what_the_image_copies_is_in_the_checkout():
    copied = [
        source
        for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert {"opdjax", "setup.cfg", "tpu/requirements.txt"} <= set(copied)
    assert all((ROOT / source).exists() for source in copied)


def test_image_slice_and_sky_install_the_same_requirements():
    setup = (ROOT / "tpu" / "setup_vm.sh").read_text()
    for text in (DOCKERFILE, setup, SKY["setup"]):
        assert "--requirement tpu/requirements.txt" in text
        assert re.search(r"--editable '\.\[eval", text)


def test_the_sky_task_asks_for_the_slice_of_its_flags():
    chips = int(SKY["resources"]["accelerators"].rpartition("-")[2])
    assert SKY["envs"]["FLAGS"].split()[:2] == ["--mesh.fsdp", str(chips)]
    assert (ROOT / SKY["envs"]["EXPERIMENT"]).exists()
