"""Abstracts that came without a title, paired with the phrase in which they say what they present.

"本文提出了一种基于X的Y方法" gives 一种基于X的Y方法, "研究了X对Y的影响" gives X对Y的影响. Such
a phrase is no title, but most of a title's words stand in it, so it teaches where in an abstract to
look. Layouts as in csl.py; one abstract in five has such a phrase.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.datasets.csl import LICENSE, SOURCE, papers
from data_process.raw import Record, Skip, as_row

__all__ = ["LICENSE", "SOURCE", "read"]

KIND = "summary"
PRESENTED = re.compile(
    r"(?:提出|设计|给出|建立|构建|构造|介绍|研制|实现|描述)(?:并实现|并验证)?了?"
    r"((?:一[种个套类]|1种)[^，。；：、,;:.（）()]{6,30}?"
    r"(?:方法|算法|模型|系统|方案|策略|机制|技术|框架|协议|装置|平台|体系))(?=[，。；：、,;:.]|$)"
)
STUDIED = re.compile(
    r"(?:研究|分析|探讨|探究|考察|讨论|阐述|综述|论述)了([^，。；：,;:.（）()]{8,32})(?=[，。；,;.]|$)"
)


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One pair an abstract that has such a phrase and no title."""
    for record, paper in papers(records, "abstract"):
        if isinstance(paper, Skip):
            yield paper
        elif "title" in paper:
            yield Skip("has_title", record.where, paper["title"], broken=False)
        elif found := PRESENTED.search(paper["abstract"]) or STUDIED.search(paper["abstract"]):
            yield as_row(record, text=paper["abstract"], summary=found[1])
        else:
            yield Skip("no_phrase", record.where, paper["abstract"], broken=False)
