"""Make the image of the page for the README: the released model writes a title.

PYTHONPATH=.:tests python tests/serve/page_picture.py assert/page.png
"""

import sys
import tempfile
from pathlib import Path

from babyllama.config import REPO
from browsing import ask, launched, until, visitor
from serving import serving

ABSTRACT = (
    "针对移动机器人在未知环境中的路径规划问题，提出了一种基于改进蚁群算法的路径规划方法。该方法在信息素更新中引入距离因子，"
    "加快了收敛速度；通过自适应调整挥发系数，避免算法陷入局部最优。仿真结果表明，改进蚁群算法能有效地为移动机器人规划出较优的路径。"
)


def main(out: Path) -> None:
    size = {"width": 1180, "height": 720}
    with (
        tempfile.TemporaryDirectory() as place,
        serving(REPO / "release", Path(place) / "log") as server,
        launched() as browser,
        visitor(browser, server.url, viewport=size) as page,
    ):
        page.evaluate("state.sampling.seed = '1'")
        page.evaluate("setMode('chat')")
        ask(page, "你好，你是谁？", tokens=60)
        page.click("#fresh")
        until(page, "talk.messages.length === 0")
        page.evaluate("setMode('title')")
        page.fill("#question", ABSTRACT)
        page.press("#question", "Enter")
        until(page, "!writing && document.querySelectorAll('.titles li').length > 1", 120)
        page.evaluate("document.querySelector('#toast').hidden = true")
        page.mouse.move(600, 600)
        page.screenshot(path=out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
