//! How each `tokenizer.ggml.pre` splits text before byte-level BPE merges.
//!
//! The regular expressions are facts of the models: where an engine has to
//! adapt them because it lacks Unicode classes, the form of the model's own
//! `tokenizer.json` stands here. A name that is not in [`TABLE`] is refused,
//! and so is a file without a name.

use tokenizers::{
    PreTokenizedString, PreTokenizer, Result, SplitDelimiterBehavior,
    pre_tokenizers::{
        byte_level::ByteLevel,
        split::{Split, SplitPattern},
    },
    tokenizer::pattern::Pattern,
    utils::SysRegex,
};

/// One splitting step; applied to every piece that the steps before left.
pub enum Step {
    /// Matches and the gaps between them become pieces.
    Regex(Box<Split>),
    /// Matches (runs of digits) in threes, counted from the right.
    Threes(SysRegex),
    /// Bytes become the printable characters of GPT-2's table.
    Bytes(ByteLevel),
}

impl PreTokenizer for Step {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> Result<()> {
        match self {
            Self::Regex(split) => split.pre_tokenize(text),
            Self::Threes(runs) => text
                .split(|_, piece| piece.split(FromRight(runs), SplitDelimiterBehavior::Isolated)),
            Self::Bytes(bytes) => bytes.pre_tokenize(text),
        }
    }
}

struct FromRight<'r>(&'r SysRegex);

impl Pattern for FromRight<'_> {
    fn find_matches(&self, inside: &str) -> Result<Vec<((usize, usize), bool)>> {
        let mut pieces = Vec::new();
        for ((start, end), is_run) in self.0.find_matches(inside)? {
            if !is_run {
                pieces.push(((start, end), false));
                continue;
            }
            let mut borders: Vec<usize> =
                inside[start..end].char_indices().map(|(at, _)| start + at).collect();
            let odd = borders.len() % 3;
            borders.push(end);
            let mut from = start;
            for border in borders.into_iter().skip(odd).step_by(3) {
                if border > from {
                    pieces.push(((from, border), true));
                    from = border;
                }
            }
        }
        Ok(pieces)
    }
}

/// A row of [`TABLE`].
pub struct Pre {
    pub names: &'static [&'static str],
    steps: &'static [Rule],
    /// A word that is itself a token is not split further.
    pub whole_words: bool,
    /// Whether a prompt begins with the BOS token when the file does not say.
    pub add_bos: bool,
    /// Words are GPT-2 byte characters; otherwise text with U+2581 for spaces
    /// and `<0xXX>` tokens for what is in no token.
    pub byte_level: bool,
}

enum Rule {
    Regex(&'static str),
    Threes(&'static str),
}

use Rule::{Regex, Threes};

const fn row(names: &'static [&'static str], steps: &'static [Rule]) -> Pre {
    Pre { names, steps, whole_words: false, add_bos: false, byte_level: true }
}

impl Pre {
    const fn whole_words(mut self) -> Self {
        self.whole_words = true;
        self
    }

    const fn add_bos(mut self) -> Self {
        self.add_bos = true;
        self
    }

    const fn text_level(mut self) -> Self {
        self.byte_level = false;
        self
    }

    /// The steps, compiled.
    pub fn compile(&self) -> Result<Vec<Step>> {
        let mut steps = Vec::with_capacity(self.steps.len() + 1);
        for rule in self.steps {
            steps.push(match rule {
                Regex(pattern) => Step::Regex(Box::new(Split::new(
                    SplitPattern::Regex((*pattern).to_string()),
                    SplitDelimiterBehavior::Isolated,
                    false,
                )?)),
                Threes(pattern) => Step::Threes(SysRegex::new(pattern)?),
            });
        }
        if self.byte_level {
            steps.push(Step::Bytes(ByteLevel::new(false, true, false)));
        }
        Ok(steps)
    }
}

/// The row of a name.
pub fn find(name: &str) -> Option<&'static Pre> {
    TABLE.iter().find(|row| row.names.contains(&name))
}

/// All names, for messages.
pub fn supported() -> String {
    let names: Vec<&str> = TABLE.iter().flat_map(|row| row.names).copied().collect();
    names.join(", ")
}

/// GPT-2; the byte-level default of the `tokenizers` crate.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Llama 3, GLM-4, DBRX (tiktoken cl100k).
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 2 and 3: single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 3.5: marks belong to words.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GPT-4o, gpt-oss (tiktoken o200k), Llama 4.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Mistral Tekken.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Kimi K2: runs of Han characters are words of their own.
const KIMI: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Youtu.
const YOUTU: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Jais 2: white space in powers of two.
const JAIS2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}";

/// Ling and Ring (BailingMoE).
const BAILING: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Seed-Coder.
const SEED: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 2 without English contractions.
const UFAKZEKA: &str =
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// EXAONE-MoE.
const EXAONE_MOE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+";

/// MiniCPM 5, after digits.
const MINICPM5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// DeepSeek V3, after digits and CJK.
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// Spark 2.5, after digits and CJK.
const SPARK: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##;

/// Chinese and Japanese in DeepSeek V3.
const DEEPSEEK_CJK: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";

/// Cased letters of DeepSeek LLM.
const DEEPSEEK_LETTERS: &str = "\\s?[A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\u{2af}\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\u{1e900}-\u{1e943}]+";

/// CJK of DeepSeek LLM and Coder.
const DEEPSEEK_OLD_CJK: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";

/// Scripts that AFMoE keeps apart.
const AFMOE_SCRIPTS: &str = "[\u{4e00}-\u{9fff}\u{3400}-\u{4dbf}\u{8c48}-\u{faff}\u{3040}-\u{309f}\u{30a0}-\u{30ff}\u{ff65}-\u{ff9f}\u{2f00}-\u{2fdf}\u{e40}-\u{e7f}\u{e80}-\u{eff}\u{1780}-\u{17ff}\u{1000}-\u{109f}\u{aa60}-\u{aa7f}\u{a9e0}-\u{a9ff}\u{ac00}-\u{d7af}\u{1100}-\u{11ff}]+";

/// Youtu's scripts and punctuation.
const YOUTU_CJK: &str = "[\u{ac00}-\u{d7a3}\u{3131}-\u{318e}]+|[\u{ff01}\u{2026}\u{201c}\u{201d}\u{2018}\u{2019}\u{2014}\u{ff1a}\u{ff1b}\u{ff0c}\u{3001}-\u{303f}\u{fe30}-\u{fe4f}]+|[\u{3105}-\u{312f}]+|[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";

/// BLOOM and its relatives.
const SENTENCE: &str = " ?[^(\\s|.,!?\u{2026}\u{3002}\u{ff0c}\u{3001}\u{964}\u{6d4}\u{60c})]+";

/// Names as converters write them into `tokenizer.ggml.pre`.
pub static TABLE: &[Pre] = &[
    row(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
        ],
        &[Regex(GPT2)],
    ),
    row(
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        &[Regex(LLAMA3)],
    )
    .whole_words()
    .add_bos(),
    row(&["smaug-bpe", "dbrx", "chatglm-bpe"], &[Regex(LLAMA3)]),
    row(&["glm4", "glm5"], &[Regex(LLAMA3)]).whole_words(),
    row(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        &[Regex(QWEN2)],
    ),
    row(&["qwen35"], &[Regex(QWEN35)]),
    row(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[Regex(GPT4O)]),
    row(&["tekken"], &[Regex(TEKKEN)]).whole_words().add_bos(),
    row(&["kimi-k2"], &[Regex(KIMI)]),
    row(
        &[
            "starcoder",
            "refact",
            "command-r",
            "smollm",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        &[Regex(r"\p{N}"), Regex(GPT2)],
    ),
    row(&["falcon"], &[Regex(r"[\p{P}$+<=>^~|`]+"), Regex(GPT2), Regex("[0-9][0-9][0-9]")]),
    row(
        &["deepseek-llm"],
        &[
            Regex(r"[\r\n]"),
            Regex(DEEPSEEK_LETTERS),
            Regex(
                "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+",
            ),
            Regex(r"\s+$"),
            Regex(DEEPSEEK_OLD_CJK),
            Regex(r"\p{N}+"),
        ],
    ),
    row(
        &["deepseek-coder"],
        &[
            Regex(r"[\r\n]"),
            Regex(r"\s?\p{L}+"),
            Regex(r"\s?\p{P}+"),
            Regex(DEEPSEEK_OLD_CJK),
            Regex(r"\p{N}"),
        ],
    ),
    row(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &[Regex(r"\p{N}{1,3}"), Regex(DEEPSEEK_CJK), Regex(DEEPSEEK3)],
    ),
    row(&["spark2_5"], &[Regex(r"\p{N}{1,3}"), Regex(DEEPSEEK_CJK), Regex(SPARK), Regex(r"\p{N}")]),
    row(&["youtu"], &[Regex(YOUTU_CJK), Regex(YOUTU)]).whole_words(),
    row(&["afmoe"], &[Threes(r"\p{N}+"), Regex(AFMOE_SCRIPTS), Regex(DEEPSEEK3)]),
    row(&["tiny_aya", "cohere2moe"], &[Threes(r"\d+\b"), Regex(GPT4O)]),
    row(&["bailingmoe", "bailingmoe2", "llada-moe"], &[Regex(BAILING)]),
    row(&["seed-coder"], &[Regex(SEED)]),
    row(&["ufakzeka"], &[Regex(UFAKZEKA)]),
    row(&["laguna"], &[Regex(r"[^\n]+|[\n]+"), Regex(QWEN2)]),
    row(&["exaone-moe"], &[Regex(EXAONE_MOE)]),
    row(&["minicpm5"], &[Regex(r"\p{N}{1,3}"), Regex(MINICPM5)]).whole_words(),
    row(&["jais-2"], &[Regex(JAIS2)]),
    row(&["poro-chat", "bloom", "gpt3-finnish"], &[Regex(SENTENCE)]),
    row(&["viking"], &[Regex(SENTENCE), Regex(r"\p{N}")]),
    row(&["gemma4", "sarvam-moe"], &[Regex(r"[^\n]+|[\n]+")]).text_level(),
    // What llama.cpp's converter writes when it does not know the model; the
    // splitting is llama.cpp's for that name.
    row(
        &["default"],
        &[Regex(r"[\p{P}$+<=>^~|]+"), Regex(GPT2), Regex(r"\p{N}+"), Regex("[0-9][0-9][0-9]")],
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType};

    fn words(name: &str, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        for step in find(name).unwrap().compile().unwrap() {
            if !matches!(step, Step::Bytes(_)) {
                step.pre_tokenize(&mut pieces).unwrap();
            }
        }
        pieces
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|split| split.0.to_string())
            .collect()
    }

    #[test]
    fn every_row_compiles_and_no_name_is_in_two() {
        let mut seen = std::collections::HashSet::new();
        for row in TABLE {
            row.compile().unwrap();
            for name in row.names {
                assert!(seen.insert(name), "{name}");
            }
        }
        assert!(find("no-such-model").is_none());
    }

    #[test]
    fn digits_are_grouped_as_each_model_groups_them() {
        assert_eq!(words("llama-bpe", "a 12345"), ["a", " ", "123", "45"]);
        assert_eq!(words("qwen2", "123"), ["1", "2", "3"]);
        assert_eq!(words("afmoe", "1234567"), ["1", "234", "567"]);
        assert_eq!(words("cohere2moe", "12345 x"), ["12", "345", " x"]);
        assert_eq!(words("gpt-2", "a 12345"), ["a", " 12345"]);
    }

    #[test]
    fn han_runs_are_words_of_their_own_for_kimi() {
        assert_eq!(words("kimi-k2", "ab中文cd's"), ["ab", "中文", "cd's"]);
        assert_eq!(words("gpt-4o", "ab中文cd's"), ["ab中文cd's"]);
    }

    #[test]
    fn long_runs_are_split_in_linear_time() {
        let start = std::time::Instant::now();
        for name in ["llama-bpe", "gpt-4o", "deepseek-v3", "cohere2moe", "deepseek-llm", "afmoe"] {
            for run in ["a", "A", "1", " ", "\n", "中", "!"] {
                let text = run.repeat(100_000 / run.len()) + "x";
                assert_eq!(words(name, &text).concat(), text);
            }
        }
        // Debug builds are an order of magnitude slower than release ones;
        // anything quadratic would take minutes.
        assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    }
}
