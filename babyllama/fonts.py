"""The search for a font that can write Chinese, for whoever draws a picture with names in it."""

from pathlib import Path

# Families with simplified Chinese, the more legible ones first; a part of the name is enough.
FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans", "Microsoft YaHei", "PingFang SC",
         "Hiragino Sans GB", "Heiti SC", "STHeiti", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
         "SimHei", "Noto Sans CJK", "Droid Sans Fallback", "Arial Unicode MS")  # fmt: skip
FONT_FILES = ("notosanscjk", "notosanssc", "sourcehansans", "msyh", "pingfang", "wqy", "simhei")


def cjk_font() -> str | None:
    """The name of an installed font that can write Chinese, or None."""
    from matplotlib import font_manager

    names = {font.name for font in font_manager.fontManager.ttflist if Path(font.fname).is_file()}
    for wanted in FONTS:
        if found := sorted(name for name in names if wanted in name):
            return found[0]
    # matplotlib remembers its list of fonts; one that came later is only on the disk.
    for path in sorted(font_manager.findSystemFonts()):
        if any(part in Path(path).name.lower().replace("-", "") for part in FONT_FILES):
            font_manager.fontManager.addfont(path)
            return font_manager.FontProperties(fname=path).get_name()
    return None


def writable(text: str, font: str | None) -> str:
    """A name of the user's; without a Chinese font its other characters are spelled out."""
    return text if font else text.encode("ascii", "backslashreplace").decode()
