"""Readers of dialogues and instructions on the real files, where these lie beside the project."""

from collections import Counter

import pytest
from reading import SHARED, raw, read, set_of

from babyllama.rows import check_row
from data_process.clean import fix, reason_to_drop
from data_process.raw import Skip

# Rows and skips of real files; the sums agree with plain counts of their JSON.
REAL = {
    "sft/alpaca_zh_train.jsonl.xz": ("alpaca", 13232, {}),
    "sft/belle": ("belle", 1175, {"evaluation_set": 1000}),
    "sft/redgpt": ("redgpt", 3, {}),
    "sft/pclue": ("pclue", 616, {"target_not_a_choice": 32, "cut_out_mark": 57}),
    "sft/kdconv": ("kdconv", 450, {}),
    "sft/diamante/valid.json.xz": ("diamante", 500, {}),
    "sft/lccc_toy": ("lccc", 1400, {}),
    "sft/moss_003_samples_zh.jsonl.xz": ("moss", 299, {}),
    "sft/sharegpt_zh_1K.jsonl.xz": ("sharegpt", 998, {"empty_turn": 1, "no_answer": 1}),
    "sft/chatlm_mini/train_3k.jsonl.xz": ("chatlm_mini", 3000, {}),
    "sft/llama_chinese": ("llama_chinese", 398, {"empty_turn": 1, "bad_turns": 1}),
    "sft/firefly/dummy_data.jsonl": ("firefly", 33, {}),
    "benchmarks/c3": ("c3", 10697, {}),
    "benchmarks/cmrc2018": ("cmrc2018", 1104, {"no_question": 2}),
    "benchmarks/xquad": ("squad", 256, {}),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real files")
@pytest.mark.parametrize("place", REAL)
def test_real_files_give_the_counted_rows(place):
    reader, n_rows, skips = REAL[place]
    data_set = set_of(reader)
    items = read(data_set, raw(SHARED / place, data_set))
    rows = [item for item in items if not isinstance(item, Skip)]
    assert Counter(item.reason for item in items if isinstance(item, Skip)) == skips
    rules = data_set.rules
    fixed = [fix(row | {"id": str(row["id"])}, rules)[0] for row in rows[:500]]
    kept = [row for row in fixed if not reason_to_drop(row, rules)]
    reasons = {check_row({"id": row["id"], "messages": row["messages"]}) for row in kept}
    assert len(rows) == n_rows and reasons == {None}
    # Half of llama_chinese is English.
    assert len(kept) >= 0.45 * len(fixed)
