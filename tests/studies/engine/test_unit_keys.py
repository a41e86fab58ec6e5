"""Keys of units as in studies that were run before: a changed key would make a user's study start again."""

import hashlib

import pytest
from helpers.plans import made

from sparselet.studies.engine.unit import closure
from sparselet.studies.tables import make_tables

CHANGES = {
    "seeds": (0, 3),
    "dtype": "bfloat16",
    "threads": 2,
    "chat_template": False,
    "patience": 2,
    "gradient_accumulation": 2,
    "second_stage_rows": 3,
    "first_stage_epochs": 1.0,
    "max_input_length": 100,
    "max_new_tokens": 5,
    "score": "gm",
    "density": 0.3,
    "validation_rows": 4,
}

# By table: number of units and start of the SHA-256 of their sorted keys.
DEFAULTS = {
    "density": (119, "71d7985ce8258ef8"),
    "merging": (64, "ddce6a792a9b4783"),
    "scores": (112, "0d0bf55a2f26f576"),
    "layer_drop": (32, "14c8a194366f8439"),
    "second_stage": (52, "c6a1e4f824cde118"),
    "interference": (17, "5c7c299a1c7dda47"),
    "number_of_experts": (86, "1030b18421899a6d"),
    "targets": (48, "73d896b82dd145cd"),
    "selection": (12, "4f34dcf123dc210f"),
    "learning_rates": (36, "ac33658dc916fc88"),
    "block_sizes": (18, "ffb370b3715bd9b1"),
}
CHANGED = {
    "density": (231, "73f1cb70e9effa99"),
    "merging": (128, "6c797ca935157b90"),
    "scores": (224, "dcfd213e4c52603a"),
    "layer_drop": (64, "4348c0f7c8793a75"),
    "second_stage": (104, "e21a5e5257df0050"),
    "interference": (34, "ff7cbf1fac4d17f3"),
    "number_of_experts": (172, "0881077af9b542f2"),
    "targets": (96, "0b6468c6cead4397"),
    "selection": (24, "fe8e7fdb004bc2aa"),
    "learning_rates": (72, "8fb60bd4578dcf64"),
    "block_sizes": (36, "b5251f6a23e40244"),
}
SINGLE = {
    "one: sparse": "fa93586a765f44e3a1eea93437b3decb",
    "overlap of 4: sparse": "76735ba4cafd66c8aa507efca5752092",
    "overlap of 4: sparse, asked one": "ba594a4d9a116f19257cef51dc876d38",
    "overlap of 4: sparse, asked seven": "00faa5ebf46dcd139cc9e534d89173d2",
}


@pytest.mark.parametrize(("changes", "recorded"), [({}, DEFAULTS), (CHANGES, CHANGED)], ids=["defaults", "changed"])
def test_the_keys_of_every_table_are_as_recorded(changes, recorded):
    for name, table in make_tables(made(**changes)).items():
        keys = sorted(closure(table.units()))
        assert (len(keys), hashlib.sha256("".join(keys).encode()).hexdigest()[:16]) == recorded[name], name


def test_single_keys_are_as_recorded():
    units = closure(make_tables(made())["second_stage"].units()).values()
    keys = {unit.label: unit.key for unit in units}
    assert {label: keys[label] for label in SINGLE} == SINGLE
