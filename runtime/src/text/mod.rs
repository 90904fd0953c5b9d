//! Text in, tokens out, and back: tokenizers from `tokenizer.json` or from
//! GGUF metadata, chat templates, streamed decoding with stop strings.
//!
//! Text of a user never becomes a control token. [`Tokenizer::protect`] breaks
//! control-token text in a user's string by an invisible mark before a
//! template sees it, control tokens are looked for while the marks are in
//! place, and the marks go before anything is split or merged.

pub mod chat;
mod engine;
mod gguf_tokenizer;
mod gguf_vocabulary;
mod json_tokenizer;
mod marks;
mod moment;
mod pieces;
mod pretokenizers;
mod python;
mod specials;
mod spm;
pub mod stream;
pub mod template;
mod template_functions;
mod template_rewrite;
mod template_scan;
mod tokenizer;

pub use chat::encode_chat;
pub use moment::Moment;
pub use stream::{StopMatcher, StreamDecoder, TextStream};
pub use template::{ChatTemplate, Message, RenderOptions};
pub use tokenizer::{Limits, TextKind, Tokenizer};
