"""Cleaning of articles from news and other web sites: what sites lay round a text, and spam.

Fixes and rules as in clean.py, which lists them in its tables. `text` is the body of an article,
`summary` its headline.
"""

import re

from data_process.han import HAN, han_share

Row = dict

# Fixes.

TITLE_TAILS = (
    re.compile(r"\s*_.*$"),
    re.compile(r"\s*[|｜].*$"),
    re.compile(r"\s*(?:--|\s[-–—]\s).*$"),
    re.compile(r"[-–—][^-–—]{0,12}(?:网|新闻|论坛|频道|在线|公司|头条)\S{0,6}$"),
)
TITLE_LABEL = re.compile(
    r"^(?:\[[^\]]{1,8}\]|【[^】]{1,8}】|「[^」]{1,8}」|标题[:：]|原标题[:：]|\w{1,8}\s?[|｜丨])\s*"
)
LEAST_TITLE = 6

HEAD_LINE = re.compile(
    r"^(?:[^\n。]{0,20}(?:点击?上方|点击?蓝字|点上方|蓝色字)[^\n。，]{0,40}?"
    r"(?:关注(?:我们|哦|吧)?|订阅(?:本刊)?|阅读)[!！。，]?"
    r"|[(（]?原标题[:：][^\n]{0,80}(?:\n|$)|内容摘要[:：]|核心提示[:：])\s*"
)
TAIL = re.compile(
    r"\s*(?:返回搜狐|查看更多|特别声明[:：]|免责声明[:：]|声明[:：]|本文来自大风号|本文为一点号"
    r"|责任编辑|责编|见习编辑|[(（](?:责任编辑|责编|编辑)|此稿由网友上传|视频来自[:：]|图片来源[:：]"
    r"|阅读全文|我要反馈|举报本文|分享到[:：]|相关阅读[:：]|文章关键词|更多精彩[:：]?|\(admin\)"
    r"|长按.{0,6}二维码|长按识别|扫.{0,4}二维码|转载请注明|版权归原作者|如有侵权|欢迎转载"
    r"|新媒体协会|广告合作|原标题[:：]?).*$",
    re.DOTALL,
)
CREDIT = re.compile(
    r"\s*[(（【]?(?:[^\s，。！？]{0,4}编辑|来源|编审|监制|校对|编译|供稿|运营人员|文/图|图/文|作者)"
    r"[:：｜|].{0,40}$"
)
LOST_SPACES = re.compile(r"(?:\?[ \n]+)+\?|^\?+|\? *$")
TAIL_REACH = 300  # a tail starts this near the end; further inside it may be part of the story


def cut_title_tail(row: Row) -> Row:
    """Site names, key words and labels round a headline go, if a headline is left.

    The name of a forum stays: the rule `forum` drops the row by it.
    """
    title = row["summary"].replace("\n", " ")
    if FORUM.search(title):
        return row | {"summary": title}
    for pattern in (*TITLE_TAILS, TITLE_LABEL, TITLE_LABEL):
        shorter = pattern.sub("", title)
        if len(shorter) >= LEAST_TITLE:
            title = shorter
    return row | {"summary": title.strip()}


def cut_site_text(row: Row) -> Row:
    """ "Tap above to follow us", disclaimers, editors and the like go from both ends."""
    text = LOST_SPACES.sub("", row["text"]) if "?" in row["text"] else row["text"]
    head = HEAD_LINE.match(text)
    text = text[head.end() :] if head else text
    start = max(len(text) - TAIL_REACH, 0)
    tail = CREDIT.sub("", TAIL.sub("", text[start:]).rstrip())
    return row | {"text": (text[:start] + tail).strip()}


def cut_repeated_title(row: Row) -> Row:
    """A body that begins with its own headline would teach copying."""
    title, text = row["summary"], row["text"]
    while title and text.startswith(title) and len(text) > len(title):
        text = text[len(title) :].lstrip(" \n:：,，。!！?？…")
    return row | {"text": text}


# Rules for articles.

GAMBLING = re.compile(
    "博彩|真人娱乐|娱乐城|娱乐平台|娱乐总代|娱乐网|娱乐官|老虎机|时时彩|六合彩|百家乐|棋牌|投注|电子游艺"
    "|澳门[金银赌]|威尼斯人|千赢|必赢|龙虎和|彩票平台|心水|赌场|注册送|体验金"
)
ADVERT = re.compile(
    "厂家|批发|供应商|生产商|加盟|代理商|采购|报价|价格表|售价|规格|型号|质优价廉|欢迎.{0,6}(?:咨询|订购|来电|选购)"
    "|咨询热线|免费咨询|诚信经营|产品特点|产品介绍|主营|(?:服务|订购)热线|[qQ]{2}[:：]\\d|1[3-9]\\d{9}|400-\\d{3}"
    "|包邮|优惠|折扣|下单|团购|月供|首付|开盘|楼盘"
)
SHOP_TITLE = re.compile(
    "厂家|批发|供应商|生产商|经销商|直销|货源|高仿|精仿|哪家好|口碑|报价|专线|加盟"
)
PROMOTION = re.compile(
    "关注我们|点击关注|长按|二维码|扫码|扫一扫|公众号|加微信|微信号|点赞|转发|投稿|粉丝|小程序|下载附件|订阅"
)
FORUM = re.compile(
    "贴吧|签到|百度知道|寻医问药|律师365|华律网|找法网|爱问共享|互动百科|百度推荐|好大夫|博客|论坛|黄页|分类网"
    "|光波网|建材网|商国互联|沭阳网|盛丰|范文|下载|招聘|前程无忧"
)
VULGAR = re.compile(
    "色情|裸聊|裸照|约炮|援交|强奸|轮奸|性侵|性虐|猥亵|嫖|卖淫|乱伦|情妇|阴道|肛门|小三|出轨|强暴"
)


def short_body(row: Row) -> bool:
    """Under 80 Han characters: a picture, a film or a page that failed to load."""
    return sum(map(len, HAN.findall(row["text"]))) < 80


def little_han(row: Row) -> bool:
    """Less than six in ten characters are Han: tables, links, code."""
    return han_share(row["text"]) < 0.6


def gambling(row: Row) -> bool:
    """Betting pages, most of them stitched from other articles to mislead search engines."""
    return bool(GAMBLING.search(row["summary"])) or len(GAMBLING.findall(row["text"])) > 2


def advert(row: Row) -> bool:
    """A shop's headline, or a body with more than one selling word in 100 characters."""
    n_words = len(ADVERT.findall(row["text"]))
    return bool(SHOP_TITLE.search(row["summary"])) or n_words > max(3, len(row["text"]) / 100)


def promotion(row: Row) -> bool:
    """Three or more calls to follow, scan or share."""
    return len(PROMOTION.findall(row["text"])) > 2


def forum(row: Row) -> bool:
    """The page is a forum, question, download or shop page, as its title says."""
    return bool(FORUM.search(row["summary"]))


def vulgar(row: Row) -> bool:
    """Sexual violence and the like, in the headline or three times in the body."""
    return bool(VULGAR.search(row["summary"])) or len(VULGAR.findall(row["text"])) > 2


# Rules for pairs of text and headline.

SHOUTING = re.compile(
    r"[!！].*[!！]|速看|99%|想不到|惊呆|必看|赶紧看|快看|转疯|一定要看|你知道吗|太可怕|看完|看哭|为什么.*[?？]|扩散"
)
CUT_OFF = re.compile(r"^[.…]{2,}|[.…]{2,}$")
WORD = re.compile(r"[\u4e00-\u9fff0-9a-zA-Z]+")


def short_title(row: Row) -> bool:
    """Under six characters, or over 40: a section's name, or half the article."""
    return not LEAST_TITLE <= len(row["summary"]) <= 40


def title_cut_off(row: Row) -> bool:
    """The headline begins or ends in dots."""
    return bool(CUT_OFF.search(row["summary"]))


def clickbait(row: Row) -> bool:
    """The headline shouts or teases instead of telling."""
    return bool(SHOUTING.search(row["summary"]))


def title_not_in_text(row: Row) -> bool:
    """Fewer than three in ten pairs of neighbouring headline characters stand in the text."""
    title = "".join(WORD.findall(row["summary"])).lower()
    text = "".join(WORD.findall(row["text"])).lower()
    pairs = [title[i : i + 2] for i in range(len(title) - 1)]
    return sum(pair in text for pair in pairs) < 0.3 * len(pairs) or not pairs
