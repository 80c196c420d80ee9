"""Make the image of the terminal for docs/: the released model, asked through a pipe.

PYTHONPATH=.:tests python tests/chat/terminal_picture.py assert/chat.png
"""

import html
import subprocess
import sys
from pathlib import Path

from babyllama.config import REPO
from browsing import launched

SAID = (
    "你好",
    "你会做什么？",
    "我今天好累",
    "/总结 城市交通系统是一个非常复杂的非线性系统,很难建立精确的数学模型,而BP神经网"
    "络具有较强的自学习、自适应的特点,适合复杂的大系统。针对单交叉路口红绿灯控制问题,基"
    "于改进的BP神经网络算法,同时考虑关键车流和非关键车流信息,提出并设计了两级加权神经"
    "网络控制器来进行实时控制。仿真结果表明,本方法优于传统控制方法。",
    "谢谢！",
)
STYLE = """
main { padding: 12px 22px 16px; background: #1f1f29; color: #eee; width: 936px;
       font: 22px/34px "Noto Sans CJK SC", sans-serif }
p { margin: 0; padding-left: 20px; text-indent: -20px; overflow-wrap: anywhere }
.note { color: #999 } .said { color: #8be9fd }
"""


def main(out: Path) -> None:
    command = [sys.executable, "chat.py", "release", "--seed", "1"]
    done = subprocess.run(
        command, input="\n".join(SAID), cwd=REPO, capture_output=True, text=True, check=True
    )
    lines = ["$ python chat.py release", *done.stdout.splitlines()]
    kinds = {"助手": "said", "标题": "said", "人类": "user"}
    body = "".join(
        f'<p class="{kinds.get(line[:2], "note")}">{html.escape(line)}</p>' for line in lines
    )
    with launched() as browser:
        page = browser.new_page()
        page.set_content(f"<html lang=zh-CN><style>{STYLE}</style><main>{body}</main></html>")
        page.locator("main").screenshot(path=out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
