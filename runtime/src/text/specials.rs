//! Which tokens end an answer, and which texts a user must not be able to
//! write as tokens.

/// Tokens that end a turn in published chat models, by text.
pub const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|eot|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
    "</s>",
    "<eos>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// The ids among `present` (text and id of special tokens) that end an
/// answer. Where `<|return|>` and `<|call|>` (or their like) exist, `<|end|>`
/// ends a message inside an answer and not the answer; where
/// `<|tool_response>` exists, `</s>` is ordinary text.
pub fn end_of_turn_ids(present: &[(&str, u32)]) -> Vec<u32> {
    let has = |text: &str| present.iter().any(|(found, _)| *found == text);
    let calls = has("<|call|>") || has("<|calls|>");
    let end_is_inside = calls && (has("<|return|>") || has("<|flush|>"));
    present
        .iter()
        .filter(|(text, _)| END_OF_TURN.contains(text))
        .filter(|(text, _)| !(*text == "<|end|>" && end_is_inside))
        .filter(|(text, _)| !(*text == "</s>" && has("<|tool_response>")))
        .map(|(_, id)| *id)
        .collect()
}

/// Whether an added token looks like markup that only a template should
/// write, even where its file calls it ordinary (DeepSeek's role markers).
pub fn looks_like_control(text: &str) -> bool {
    let opens = text.starts_with("<|") || text.starts_with("<\u{ff5c}");
    let closes = text.ends_with("|>") || text.ends_with("\u{ff5c}>");
    (opens || closes) && text.len() > 3
}

/// Tags around reasoning. They are text that templates search for in earlier
/// answers, so an assistant's message keeps them whole.
pub const REASONING_TAGS: &[&str] =
    &["<think>", "</think>", "[THINK]", "[/THINK]", "<|START_THINKING|>", "<|END_THINKING|>"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_is_inside_an_answer_where_return_and_call_exist() {
        let plain = [("<|end|>", 1), ("<|user|>", 2)];
        assert_eq!(end_of_turn_ids(&plain), [1]);
        let harmony = [("<|end|>", 1), ("<|return|>", 2), ("<|call|>", 3)];
        assert_eq!(end_of_turn_ids(&harmony), [2, 3]);
        let gemma = [("</s>", 1), ("<|tool_response>", 2), ("<turn|>", 3)];
        assert_eq!(end_of_turn_ids(&gemma), [2, 3]);
    }

    #[test]
    fn markup_is_told_from_words() {
        for text in ["<|im_end|>", "<\u{ff5c}User\u{ff5c}>", "<turn|>", "<|tool_response>"] {
            assert!(looks_like_control(text), "{text}");
        }
        for text in ["<think>", "|>", "<|", "   ", "<br>"] {
            assert!(!looks_like_control(text), "{text}");
        }
    }
}
