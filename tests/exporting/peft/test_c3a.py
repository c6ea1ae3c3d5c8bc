"""C3A of PEFT and c3a: the same logits, both ways."""

import json

from addenda.exporting.peft.write import write
from peft_checks import CONFIG, attached, holds, passes, refused, rows, saved, spoil


@rows("C3A")
def test_a_row_gives_the_same_logits(row, tmp_path):
    holds(row, tmp_path)


def test_blocks_by_site_stand_in_a_pattern_of_whole_paths(tmp_path):
    write(attached({"*.q_proj": "c3a:block=8", "*.0.*.k_proj": "c3a:block=16"}), tmp_path)
    given = json.loads((tmp_path / CONFIG).read_text())
    assert given["block_size"] == 8
    assert given["block_size_pattern"] == {"model.layers.0.self_attn.k_proj": 16}


def test_what_does_not_fit_is_refused(tmp_path):
    folder = saved(tmp_path / "a", "C3A", block_size=16, target_modules=["q_proj"])
    refused(spoil(folder, block_size=8), r"c3a_kernel is \[2, 2, 16\], and the config .* say \[4, 4, 8\]")
    refused(spoil(folder, block_size=5), "block=5 does not divide")
    refused(spoil(folder, block_size=16, block_size_pattern={"(q_proj)+": 8}), "could take for ever")
    assert passes("c3a:block=4", "transformer.h.0.attn.c_attn", "gpt2").kind == "approximate"
