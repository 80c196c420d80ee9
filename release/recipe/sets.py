"""Every set that the recipe makes itself: of papers, of passages, and talk.

python -m release.recipe.sets RAW --out data/raw/recipe
"""

from dataclasses import dataclass
from pathlib import Path

from babyllama.config import from_repo, parse, run
from release.recipe import papers, passages, talk


@dataclass(frozen=True)
class SetsConfig:
    """Source and target files.

    Args:
        raw: folder with the files
        out: folder for the sets
        kept_out: .u64 lists of texts that must not be trained on, against which titles that stand
            alone are held here; all else is held against them by data_process
    """

    raw: Path
    out: Path = Path("data/raw/recipe")
    kept_out: tuple[Path, ...] = ()


def main(cfg: SetsConfig) -> None:
    """Make all sets; the talk takes some of the dialogues about papers."""
    raw, out = from_repo(cfg.raw), from_repo(cfg.out)
    papers.write(raw, out, map(from_repo, cfg.kept_out))
    passages.write(raw, out)
    talk.write(raw, out)


if __name__ == "__main__":
    run(main, parse(SetsConfig, __doc__, positional=("raw",)))
