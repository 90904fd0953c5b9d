//! Launchers of `kernels/cuda/router_chunk.cu`: routing of a prompt's chunk.

use super::args::Args;
use super::router::{MOST_EXPERTS, RouterTable, THREADS};
use super::shape::fills;
use super::stream::Grid;
use super::{CudaError, Device, Span, Stream};

/// Rows and tokens of a block of `chunk_logits`.
const ROWS_PER_BLOCK: usize = 8;
const TOKENS_PER_BLOCK: usize = 8;
/// Tokens of a call: what `i32` indices and a grid can have.
const MOST_TOKENS: usize = 1 << 18;
const GATHER_THREADS: u32 = 256;

fn check_tokens(call: &'static str, tokens: usize) -> Result<(), CudaError> {
    if tokens == 0 || tokens > MOST_TOKENS {
        let problem = format!("{tokens} tokens, 1 to {MOST_TOKENS}");
        return Err(CudaError::shape(call, problem));
    }
    Ok(())
}

/// A router's logits for many tokens, for routers of float formats (others:
/// the matrix products of every layer).
pub struct ChunkLogits<'a> {
    pub table: &'a RouterTable,
    /// Index into the table.
    pub layer: usize,
    pub tokens: usize,
    /// f32 `[tokens, hidden]`, behind the norm.
    pub x: &'a Span,
    /// f32 `[tokens, experts]`, overwritten; bias included.
    pub logits: &'a Span,
}

impl ChunkLogits<'_> {
    /// Bytes that must move: the router once, inputs and answers.
    pub fn bytes(&self) -> u64 {
        let router = self.table.layers().get(self.layer).map_or(0, |layer| layer.weight.bytes());
        router + (self.x.bytes() + self.logits.bytes()) as u64
    }
}

/// # Errors
/// [`CudaError::Shape`] when sizes do not fit, [`CudaError::Unsupported`] for
/// a quantised router; the driver's.
pub fn chunk_logits(
    device: &Device,
    stream: &Stream,
    call: ChunkLogits<'_>,
) -> Result<(), CudaError> {
    let ChunkLogits { table, layer, tokens, x, logits } = call;
    check_tokens("chunk_logits", tokens)?;
    let router = table.layer("chunk_logits", layer)?;
    if !router.is_float() {
        let format = router.weight.format;
        return Err(CudaError::unsupported(format!("chunk_logits of a {format} router")));
    }
    fills("chunk_logits", "the input", x, tokens * table.hidden())?;
    fills("chunk_logits", "the logits", logits, tokens * router.experts())?;
    let args = Args::new()
        .span(&table.record(layer))
        .span(x)
        .i32(tokens as i32)
        .i32(table.hidden() as i32)
        .span(logits);
    let rows = router.experts().div_ceil(ROWS_PER_BLOCK) as u32;
    let blocks = [rows, tokens.div_ceil(TOKENS_PER_BLOCK) as u32, 1];
    let grid = Grid { blocks, threads: [THREADS, 1, 1], shared_bytes: 0 };
    stream.launch(&device.kernel("router_chunk", &["chunk_logits"])?, grid, args)
}

/// A layer's rule on the logits of many tokens.
pub struct ChunkChoice<'a> {
    pub table: &'a RouterTable,
    /// Index into the table.
    pub layer: usize,
    pub tokens: usize,
    /// f32 `[tokens, experts]`, bias included.
    pub logits: &'a Span,
    /// i32 `[tokens, top_k]`, in router order
    pub ids: &'a Span,
    /// f32 `[tokens, top_k]`
    pub weights: &'a Span,
}

impl ChunkChoice<'_> {
    /// Bytes that must move: logits and answers.
    pub fn bytes(&self) -> u64 {
        (self.logits.bytes() + self.ids.bytes() + self.weights.bytes()) as u64
    }
}

/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn chunk_choose(
    device: &Device,
    stream: &Stream,
    call: ChunkChoice<'_>,
) -> Result<(), CudaError> {
    let ChunkChoice { table, layer, tokens, logits, ids, weights } = call;
    check_tokens("chunk_choose", tokens)?;
    let router = table.layer("chunk_choose", layer)?;
    let top_k = router.rule.top_k();
    fills("chunk_choose", "the logits", logits, tokens * router.experts())?;
    fills("chunk_choose", "the ids", ids, tokens * top_k)?;
    fills("chunk_choose", "the weights", weights, tokens * top_k)?;
    let args = Args::new().span(&table.record(layer)).span(logits).span(ids).span(weights);
    let grid = Grid::new(tokens as u32, THREADS);
    stream.launch(&device.kernel("router_chunk", &["chunk_choose"])?, grid, args)
}

/// The experts that a layer's rule would prefer for rows of logits.
pub struct ChunkRank<'a> {
    pub table: &'a RouterTable,
    /// Index into the table.
    pub layer: usize,
    pub rows: usize,
    /// f32 `[rows, experts]`, bias included.
    pub logits: &'a Span,
    /// Experts to name for each row, at most [`MOST_EXPERTS`].
    pub experts: usize,
    /// i32 `[rows, experts]`: by [`crate::RoutingRule::rank`], best first; -1
    /// behind the last.
    pub ids: &'a Span,
    /// f32 `[rows, experts]`
    pub scores: &'a Span,
}

impl ChunkRank<'_> {
    /// Bytes that must move: logits and answers.
    pub fn bytes(&self) -> u64 {
        (self.logits.bytes() + self.ids.bytes() + self.scores.bytes()) as u64
    }
}

/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn chunk_rank(device: &Device, stream: &Stream, call: ChunkRank<'_>) -> Result<(), CudaError> {
    let ChunkRank { table, layer, rows, logits, experts, ids, scores } = call;
    check_tokens("chunk_rank", rows)?;
    let router = table.layer("chunk_rank", layer)?;
    if experts == 0 || experts > MOST_EXPERTS {
        let problem = format!("{experts} experts of a row, at most {MOST_EXPERTS}");
        return Err(CudaError::shape("chunk_rank", problem));
    }
    fills("chunk_rank", "the logits", logits, rows * router.experts())?;
    fills("chunk_rank", "the ids", ids, rows * experts)?;
    fills("chunk_rank", "the scores", scores, rows * experts)?;
    let record = table.record(layer);
    let args = Args::new().span(&record).span(logits).i32(experts as i32).span(ids).span(scores);
    let grid = Grid::new(rows as u32, THREADS);
    stream.launch(&device.kernel("router_chunk", &["chunk_rank"])?, grid, args)
}

/// Sorts a chunk's choices by expert: [`crate::Grouping::gather`] on the
/// device.
pub struct ChunkGather<'a> {
    pub tokens: usize,
    /// Choices of each token.
    pub per_token: usize,
    pub experts: usize,
    /// i32 `[tokens, per_token]`, each below `experts`
    pub ids: &'a Span,
    /// i32 `[experts + 1]`: expert `e` has rows `starts[e]..starts[e + 1]`.
    pub starts: &'a Span,
    /// i32 `[rows]`: the token of each row; `rows = tokens * per_token`.
    pub token_of: &'a Span,
    /// i32 `[rows]`: the choice of each row, token times `per_token` plus its
    /// place in the token's list.
    pub choice_of: &'a Span,
    /// i32 `[choices]`: the row of each choice.
    pub row_of: &'a Span,
}

impl ChunkGather<'_> {
    /// Bytes that must move: ids and answers.
    pub fn bytes(&self) -> u64 {
        let spans = [self.ids, self.starts, self.token_of, self.choice_of, self.row_of];
        spans.into_iter().map(|span| span.bytes() as u64).sum()
    }
}

/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn chunk_gather(
    device: &Device,
    stream: &Stream,
    call: ChunkGather<'_>,
) -> Result<(), CudaError> {
    let ChunkGather { tokens, per_token, experts, ids, starts, token_of, choice_of, row_of } = call;
    let name = "chunk_gather";
    check_tokens(name, tokens)?;
    if per_token == 0 || per_token > 64 || experts == 0 || experts > 0xffff {
        let problem = format!("{per_token} of {experts} experts for each token");
        return Err(CudaError::shape(name, problem));
    }
    let choices = tokens * per_token;
    fills(name, "the ids", ids, choices)?;
    fills(name, "the starts", starts, experts + 1)?;
    fills(name, "the tokens of the rows", token_of, choices)?;
    fills(name, "the choices of the rows", choice_of, choices)?;
    fills(name, "the rows of the choices", row_of, choices)?;
    let args = Args::new()
        .span(ids)
        .i32(choices as i32)
        .i32(per_token as i32)
        .i32(experts as i32)
        .span(starts)
        .span(token_of)
        .span(row_of)
        .span(choice_of);
    let grid = Grid::new(experts as u32, GATHER_THREADS);
    stream.launch(&device.kernel("router_chunk", &["chunk_gather"])?, grid, args)
}
