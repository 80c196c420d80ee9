"""Published figures, by test set: ROUGE and BLEU times 100, characters, package `rouge`.

Two sets are called CSL. csl_title_public (CLGE, 2019) has computer-science abstracts of at most 256
characters, 3,000 / 500 / 500 pairs, or 10,000 to train on; `ts` of the CSL benchmark (2022) has all
thirteen categories, 8,000 / 1,000 / 1,000. Figures of one say nothing of the other.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One row of a paper or a README; what it does not state is None.

    train: pairs it was fine-tuned on, and how it decodes
    """

    system: str
    train: str
    r1: float | None
    r2: float | None
    rl: float | None
    bleu: float | None
    source: str


_CLGE = "CLGE, 500 dev"
_PEGASUS = "T5-PEGASUS"
_TORCH = "bert4torch, test"

CSL_TITLE_PUBLIC = (
    Published("LSTM seq2seq", "3k", 46.5, 30.5, 41.8, 22.0, _CLGE),
    Published("ALBERT-tiny UniLM (4M)", "3k", 52.8, 38.0, 48.1, 21.6, _CLGE),
    Published("RoBERTa-wwm-ext UniLM", "3k", 63.2, 50.7, 59.0, 41.3, _CLGE),
    Published("BERT-base UniLM", "3k", 63.8, 51.3, 59.8, 41.5, _CLGE),
    Published("WoBERT", "1k, greedy", 60.4, 49.1, 59.3, 37.9, _PEGASUS),
    Published("mT5", "1k, greedy", 61.5, 50.4, 59.9, 40.9, _PEGASUS),
    Published("T5-PEGASUS (275M)", "1k, greedy", 65.3, 54.5, 63.1, 43.6, _PEGASUS),
    Published("BERT UniLM", "10k, greedy", 65.5, 54.9, 63.8, 45.5, _PEGASUS),
    Published("WoBERT", "10k, greedy", 68.2, 57.8, 66.4, 47.8, _PEGASUS),
    Published("mT5", "10k, greedy", 69.0, 58.7, 67.0, 49.8, _PEGASUS),
    Published("T5-PEGASUS (275M)", "10k, greedy", 69.9, 59.8, 67.7, 49.4, _PEGASUS),
    Published("T5-PEGASUS (275M)", "10k, beam 3", 70.5, 60.7, 68.4, 50.2, _PEGASUS),
    Published("BERT UniLM", "10k", 66.3, 54.8, 63.0, 44.6, _TORCH),
    Published("BART-base", "10k", 68.4, 57.3, 65.0, 47.7, _TORCH),
    Published("mT5", "10k", 69.4, 59.1, 66.0, 50.1, _TORCH),
)
LCSTS = (
    Published("BERT UniLM", "greedy", 29.6, 18.0, 28.0, None, _PEGASUS),
    Published("WoBERT", "greedy", 32.9, 21.1, 31.5, None, _PEGASUS),
    Published("mT5", "greedy", 30.8, 19.5, 28.9, None, _PEGASUS),
    Published("T5-PEGASUS (275M)", "greedy", 33.5, 21.5, 31.2, None, _PEGASUS),
    Published("T5-PEGASUS (275M)", "beam 3", 34.1, 22.2, 31.8, None, _PEGASUS),
    Published("BART-base", "whole train", None, None, 37.8, None, "CPT, one score, taken for R-L"),
    Published("CPT-large", "whole train", None, None, 42.0, None, "CPT, one score, taken for R-L"),
    Published("Randeng-Pegasus-523M", "mixture", 46.9, 33.9, 43.5, None, "its model card"),
    Published("MoCoBart", "not stated", 42.04, 27.22, 38.34, None, "its repository, 725 test rows"),
)
# Of `ts` no figures of this protocol were found: the paper's are ROUGE-L alone.
SETS: dict[str, tuple[Published, ...]] = {
    "csl_title_public": CSL_TITLE_PUBLIC,
    "csl_ts": (),
    "lcsts": LCSTS,
}
