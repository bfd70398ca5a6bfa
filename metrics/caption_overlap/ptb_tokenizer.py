"""Penn Treebank tokens of a caption, as coco-caption's scores see them: lower-cased, without punctuation, no Java.

Written from the observed behaviour of the tokenizer that coco-caption runs, not from its source. `cider` and
`caption_overlap` hold identical copies, because `evaluate` copies a metric's own folder only; a test keeps them so.
"""

import re

# What the official tokenizer cannot read and skips: control characters, most currency signs, private use, variation
# selectors and all that lies outside the basic plane (emoji).
SKIPPED = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x90\x95\x98-\xa0\u1680\u180e\u2000-\u200f\u2012\u2024\u2025\u2027-\u202f\u203c"
    "\u203d\u2043\u2045-\u206f\u20a1-\u20a3\u20a5-\u20ab\u20ad-\u20ff\u215f-\u2182\u2185-\u218f\u2e30-\u3000\u3003\u3004"
    "\u3007-\u3011\u3013-\u3030\u3036-\u303a\u303d-\u3040\u3200-\u33ff\ud800-\uf8ff\ufe00-\ufe6f\ufefd-\uff00"
    "\U00010000-\U0010ffff]"
)

LETTER = (
    "A-Za-z\xaa\xb5\xba\xc0-\xd6\xd8-\xf6\xf8-\u1fff\u2071\u207f\u2090-\u209c\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u2139\u2183\u2184\u2c00-\u2e2f\u3005\u3006\u3031-\u3035\u3041-\u30fa"
    "\u30fc-\u31ff\u3400-\ufefc\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff66-\uffdc"
)
L, A = f"[{LETTER}]", f"[{LETTER}0-9]"
APOSTROPHE = "['\u2019\x92]"
HYPHEN = "[-\u2010\u2011\u058a]"

# Abbreviations keep their period; the second list only when written with a capital, the third only before a number.
ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co
col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov govs hon
inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont
mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte pptes ppty pptys pres prof profs pte ptes pty ptys
pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs treas tue tues
univ va vs vt wed wis wisc wm wyo
""".split()
CAPITALISED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()
NUMBERED = "art ca fig figs no nos op pp prop".split()
# A single letter before one of these, capitalised, ends a sentence and loses its period: "plan B. The".
OPENERS = """
A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One Other
Our She Since So Some Such That The Their Then There These They This We What When While Yet You Mr. Ms.
""".split()

SUFFIX = rf"{APOSTROPHE}(?i:s|m|d|ll|re|ve)(?!{A})"
NOT = "[nN]['\u2019\x92\u2018`][tT]"
ABBREVIATION = rf"(?:(?i:{'|'.join(ABBREVIATIONS)})|{'|'.join(CAPITALISED + [w.upper() for w in CAPITALISED])})\."
OPENER = "|".join(OPENERS + [word.upper() for word in OPENERS]).replace(".", r"\.")
ACRONYM = r"(?:[Pp]h|[A-Za-z])(?:\.[A-Za-z])+\.(?![A-Za-z0-9])"
NUMBER = r"(?:[0-9]*(?:[.,:][0-9]+)+|[0-9]+)"

# The first that matches wins, so longer forms stand before their parts.
PATTERNS = [
    # Most words of a caption: one alternative, tried first, for speed.
    r"[A-Za-z]+(?=,? |$)",
    # Addresses, telephone numbers, mixed fractions, tags, entities, handles, smileys.
    r"(?i:https?://[^\s\"<>|(){}]*[^\s\"<>|(){}.,!?-])",
    r"(?i:(?:[a-z]+\.)+(?:com|org|net|edu|gov)(?:/[^\s\"<>|()]*[^\s\"<>|().,!?:;'-])?)(?![A-Za-z0-9])",
    r"<[A-Za-z0-9][^\s<>@]*@[^\s<>@]+>",
    r"[A-Za-z0-9][^\s\"<>|()@]*@(?:[^\s\"<>|()@.]+\.)*[^\s\"<>|()@.]+",
    r"(?:\([0-9]{3}\)[ -]?|[0-9]{3}[ -])[0-9]{3}[ -][0-9]{4}(?![0-9])",
    r"[0-9]+ [0-9]{1,2}/[0-9]{1,2}(?![0-9])",
    r"</?[A-Za-z][^<>]*>",
    r"<!--[^<>]*>",
    r"&(?i:amp|lt|gt|quot|apos|nbsp|mdash|ndash|[a-z]acute|\#[0-9]+);",
    r"@[A-Za-z][A-Za-z0-9_]*",
    rf"\#{L}+",
    r"[A-Z]+(?:(?:&(?:amp;)?|\+)[A-Z]+)+",
    r"[:;=][-']?[()|DPp](?![A-Za-z0-9])|\^_\^",
    r"(?i:c\+\+|c\#)",
    r"(?:US|HK|[A-Z])\$",
    # Contractions: the stem first, what is contracted next.
    rf"{L}+?(?={NOT})",
    rf"{NOT}{L}*",
    SUFFIX,
    rf"{APOSTROPHE}[0-9][0-9](?:[sS](?!{A})|(?=\s|$))",
    rf"(?i:'(?:tis|twas)(?!{A}))",
    rf"(?i:{APOSTROPHE}n{APOSTROPHE}|{APOSTROPHE}(?:n|em|till?|cause)(?!{A}))",
    rf"[dlnoDLNO]{APOSTROPHE}{L}{L}+(?:{HYPHEN}{A}+)*",
    rf"(?i:ma{APOSTROPHE}ams?|n?e{APOSTROPHE}er|o{APOSTROPHE}er|ev{APOSTROPHE}ry|hallowe{APOSTROPHE}en"
    rf"|c{APOSTROPHE}est|qu{APOSTROPHE}il|s{APOSTROPHE}mores)(?!{A})|R'U[sS]",
    rf"(?i:(?:dunkin|ol|somethin|[djl]){APOSTROPHE}(?!{A})|[yjl]{APOSTROPHE}(?={L}))",
    # Hyphenated words and abbreviations.
    rf"{A}[{LETTER}0-9.,]*(?:{HYPHEN}{A}+)+(?![-/_]|{A})",
    rf"{ABBREVIATION}(?!{A})",
    rf"(?i:{'|'.join(NUMBERED)})\.(?= ?[0-9])",
    ACRONYM,
    rf"[A-Za-z]\.(?!{L}|\s+(?:{OPENER})(?:\s|$))",
    # Words and numbers.
    rf"{L}{A}*(?:\.{L}{A}*)+(?:{HYPHEN}{A}+)*",
    rf"{L}{A}*(?:[!?]{L}{A}*)+",
    r"[0-9]+-[0-9]+/[0-9]+",
    rf"{A}+(?:{HYPHEN}{L}{A}*)*(?:/{A}+(?:{HYPHEN}{L}{A}*)*){{1,2}}",
    rf"{A}+\.(?=[,;:])",
    rf"{A}+(?:[-_\u2010\u2011]{A}+)+",
    r"[0-9]+[.,:][0-9.,:]*[0-9]",
    rf"{A}*{L}{A}*",
    rf"[-+]?{NUMBER}",
    # Marks.
    r"\.{3}|-{5,}|-{2,4}|_+|\#+|\*+|[!?]+|<<|>>|''|``|@+",
    r"\S",
]
TOKEN = re.compile("|".join(PATTERNS))

CURLY = "\u2019\x92"
DROPPED = [
    *".?!,:;'`\"-\xab\xbb\u2013\u2014\u2015\u2018\u2019\u201b\u201c\u201d\u2026\u2039\u203a\x85\x91\x92\x93\x94\x96\x97"
]
DROPPED += ["''", "``", "--", "---", "----", "...", "&quot;", "&nbsp;", "&mdash;", "&ndash;"]
REWRITTEN = {
    **dict.fromkeys(DROPPED, ""),
    **{mark + ending: "'" + ending for mark in CURLY for ending in ("s", "m", "d", "ll", "re", "ve")},
    **{f"n{mark}t": "n't" for mark in CURLY}, "n\u2018t": "n`t", "'tis": "'t is", "'twas": "'t was",
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me", "lemme": "lem me",
    "&lt;": "<", "&gt;": ">", "\xa2": "cents", "\xa3": "#", "\x80": "$", "\xa4": "$", "\u20a0": "$", "\u20ac": "$",
    "\xbc": "1/4", "\xbd": "1/2", "\xbe": "3/4", "\u2153": "1/3", "\u2154": "2/3",
}  # fmt: skip
# Brackets are tokens that stay: coco-caption's list of punctuation has them in capitals, its tokens are lower-case.
ESCAPED = [
    ("(", "-lrb-"),
    (")", "-rrb-"),
    ("[", "-lsb-"),
    ("]", "-rsb-"),
    ("{", "-lcb-"),
    ("}", "-rcb-"),
    ("&amp;", "&"),
]


def tokenize(caption: str) -> str:
    """The caption's tokens joined by single spaces, "" where nothing is left.

    A token may hold no-break spaces: "1 1/2" is one. A line separator counts as a space.
    """
    if not (caption.isascii() and caption.isprintable()):
        caption = SKIPPED.sub(" ", caption.replace("\xad", ""))
    if "&" in caption:
        caption = caption.replace("&apos;", "'")
    tokens = []
    for token in TOKEN.findall(caption):
        token = token.lower().replace(" ", "\xa0")
        token = REWRITTEN.get(token, token)
        if token:
            tokens.append(token)
    line = " ".join(tokens)
    for character, name in ESCAPED:
        line = line.replace(character, name)
    return line
