"""The table of slots in a package's metadata, which programs in C++ fill slots by: examples/cpp reads it."""

from __future__ import annotations

from dataclasses import replace

import torch

from adaptc.packages.cpp_slot_table import METADATA_KEY, slot_table
from tests.support.packaged_nets import Packaged


def test_it_is_in_the_metadata_and_has_every_constant_once(net: Packaged) -> None:
    text = torch._C._aoti.AOTIModelPackageLoader.load_metadata_from_package(str(net.path), "model")[METADATA_KEY]
    manifest = net.runner.manifest
    assert text == slot_table(manifest)
    head, *lines = [line.split("\t") for line in text.splitlines()]
    assert head == ["adaptc_slots", "1"]
    scales = [line[3] for line in lines if line[0] == "site" and line[3] != "-"]
    slots = {line[2]: line for line in lines if line[0] == "slot"}
    assert sorted([*scales, *slots]) == sorted(manifest.rooms)
    assert slots["lin.lora_A.default.weight"][1:] == [
        *("lin.lora_A.weight", "lin.lora_A.default.weight", "float32", "6,9", "0", "1", "0.0", "0.0")
    ]
    assert slots["conv.lora_A.default.weight"][4:7] == ["6,6,3", "0", "3"]  # a block for each group
    assert slots["lora_A.default.weight"][4:7] == ["24,13", "0", "4"]  # and for each expert
    assert slots["head.modules_to_save.default.bias"][3:] == ["float32", "1", "-", "-", "-", "-"]
    (x, ids, gain) = (line for line in lines if line[0] == "input")
    assert (x[1:3], x[3].split(",")[2], x[4]) == (["x", "float32"], "13", "0,1,2")
    assert ids[3].split(",") == x[3].split(",")[:2]
    assert gain[1:] == ["gain", "float32", "3", "0"]


def test_what_files_do_not_hold_as_it_is_is_closed(net: Packaged) -> None:
    """Here an adapter that changes the base; a name that would break lines becomes one that fits nothing."""
    manifest = replace(net.runner.manifest, bases=["lin.weight"])
    assert "closed\tlin.weight\tthe adapter changes the base weight\n" in slot_table(manifest)
    assert "lin.lora_A" not in slot_table(manifest)
    (odd, *_) = manifest.inputs
    assert "input\ta\\tb\\n\t" in slot_table(replace(manifest, inputs=[replace(odd, name="a\tb\n")]))
