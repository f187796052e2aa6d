"""Texts that try tokenizers, and small vocabularies made for them."""

import io
import json
import unicodedata

import sentencepiece
from transformers.convert_slow_tokenizer import bytes_to_unicode

# One of everything that tokenizers treat in a way of their own.
TEXTS = [
    "",
    " ",
    "a big red circle on a white background",
    "A Big RED Circle!! two!stars",
    "hello world \"it's\" 12345 don't we'll they've I'm",
    "word " * 60,
    "x" * 150,
    "红色的大圆形在白色背景上",
    "红" * 60,
    "“引号” ‘单’ quotes",
    "Ｆｕｌｌ　ｗｉｄｔｈ　１２３！",
    "emoji 😀 👨‍👩‍👧 ❤️ 🇨🇳 done",
    "café naïve Ångström ÉCOLE İstanbul ẞ ﬁ",
    "cafe\u0301 e\u0301",
    "日本語のテキスト カタカナ 한국어 русский العربية עברית ไทย हिन्दी",
    "tab\tnew\nline\r\u00a0no-break\u200bzero\u3000wide\ufeff\u2028separator",
    "\u0000\u0001\ufffd control",
    "<|startoftext|> inside <|endoftext|> text <|STARTOFTEXT|>",
    "[CLS] literal [SEP] [PAD] [UNK] [MASK]",
    "𠀀𪛖 extension B 㐀 豈",
    "a_b-c/d\\e@f#g$h%i^j&k*l(m)n don’t …—–",
    "1/2 ½ ² Ⅻ ①",
    "unaffable running 测试abc混合123文字 ##ing",
]

# Prompts of the same meaning, which no model here has in its vocabulary as a whole.
CAPTIONS = ["白色背景上的大红色圆形", "黑色背景上的小蓝色方块", "绿色的三角形", "黄色星形"]
ENGLISH = ["a big red circle on a white background", "a small blue square on a black background", "a green triangle", "a yellow star"]

# What Chinese writers and the web add: traditional characters, rare ones, quotes and marks, numbers, links, line ends.
CHINESE_TEXTS = [
    "他说：“你好，世界！”然后离开了。",
    "『直角』「引號」《書名》〈篇名〉【方括】（圓括）",
    "中國傳統水墨畫，山水與雲霧繚繞",
    "龘靐齉爩，生僻字䲜與𠮷野家",
    "iPhone15Pro售价￥8,999.00元（约$1,200）！！！",
    "2023年10月1日 12:30～18:45 ℃ ㎡ № ①②③ Ⅷ",
    "https://例子.测试/路径?查询=1&b=2#锚 用户@例子.com",
    "一只猫\r\n坐在\t垫子上\u3000\u3000晒太阳。。。……——",
    "ㄅㄆㄇ 注音 pīnyīn ěr 拼音",
    "一" * 49 + "二" + "三",
    "，。、；：？！…—·",
    "  开头和结尾有空格  ",
]

# What open_clip's clean-up changes: broken encodings, entities, white space.
DIRTY_TEXTS = [
    "schÃ¶ne GrÃ¼ÃŸe aus MÃ¼nchen",
    "The Mona Lisa doesnÃƒÂ¢Ã¢â€šÂ¬Ã¢â€žÂ¢t have eyebrows.",
    "âœ” no problems â€” lâ€™humanitÃ©",
    "&lt;b&gt; &amp;amp; &amp;lt; &amp;amp;amp;",
    "&copy 2020 &#8364; &#x4e2d;&#22269 &notit; &unknown; & &#0; &#128; &#xD800; &#1114112; &Eacute;&EACUTE;",
    "<p>1 &lt; 2</p>\nthen &lt; 3",
    "  many   spaces \u00a0\u3000 \n\n and\x1c\x1dlines\x85 ",
    "\x1b[31mred\x1b[0m \u0085 \x93quoted\x94 \ufb01sh ﾊﾝｶｸ ｶﾞ",
    "ＬＯＵＤ　ＮＯＩＳＥＳ ｡｢｣",
]


def write_clip_vocabulary(folder):
    """Writes the files of a CLIP tokenizer that joins a few English words; returns the size of its vocabulary."""
    letters = list(bytes_to_unicode().values())
    merges = "t h,th e</w>,i n,r e,o n</w>,in g</w>,w o,wo r,wor d</w>,a b,l e</w>,ab le</w>,u n,r u,ru n,run n,e d</w>,re d</w>"
    merges = [pair.split() for pair in merges.split(",")]
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("".join(["#version: 0.2\n"] + [" ".join(pair) + "\n" for pair in merges]), "utf-8")
    return len(vocabulary)


def write_clip_tokenizer(folder, pad, length):
    """Writes a CLIP tokenizer as SDXL ships it: vocab.json and merges.txt only, special tokens as objects; returns the size of its vocabulary."""
    special = lambda content: {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {
        "bos_token": special("<|startoftext|>"),
        "eos_token": special("<|endoftext|>"),
        "unk_token": special("<|endoftext|>"),
        "pad_token": pad,
        "model_max_length": length,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return write_clip_vocabulary(folder)


def write_bert_vocabulary(folder, texts=TEXTS):
    """Writes the vocab.txt of a BERT tokenizer with pieces of several scripts; returns its size."""
    characters = {part for text in texts for part in unicodedata.normalize("NFD", text.lower()) if part.isprintable() and part != " "}
    # A few are left out, so that some words are unknown.
    letters = sorted(characters - set("ØøÅ^混") | set("abcdefghijklmnopqrstuvwxyz0123456789"))
    words = ["un", "##aff", "##able", "run", "##ning", "circle", "red", "hello", "##ing"] + ["##" + letter for letter in "abcdefgh0123日本語のテй"]
    vocabulary = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + letters + words
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    return len(vocabulary)


def write_sentencepiece(path, **options):
    """Trains a small unigram model on the texts and writes it; returns the number of its pieces."""
    model = io.BytesIO()
    lines = [line for text in TEXTS + DIRTY_TEXTS for line in text.replace("\0", "").splitlines() if line.strip()]
    settings = {"model_type": "unigram", "vocab_size": 400, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()


def write_xlm_roberta_vocabulary(folder, **options):
    """Writes sentencepiece.bpe.model; returns the number of ids, which are shifted by one and end with the mask."""
    return write_sentencepiece(folder / "sentencepiece.bpe.model", **options) + 2


def straight(texts):
    """Texts with the quotes Chinese-CLIP was trained on."""
    return [text.replace("“", '"').replace("”", '"') for text in texts]
