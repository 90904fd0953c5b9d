//! One module per subcommand.

pub mod bench;
mod bench_experts;
pub mod chat;
pub mod doctor;
pub mod eval;
pub mod inspect;
pub mod perplexity;
pub mod plan;
pub mod replay;
pub mod run;
pub mod tensor_kinds;
pub mod tokenize;
pub mod trace;
pub mod train;
