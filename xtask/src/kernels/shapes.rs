//! The steps of decoding one token with six models: which kernel, how it is
//! launched, what it must move.
//!
//! Shapes are those of the published configurations, formats those of the
//! usual files (Q4_K_M, or what the model was published in). How launches are
//! cut is said again as `kernels/src/cuda/{rows,attention,router,logits}.rs`
//! have it, since developer commands do not build the kernels.

/// A quantised format, as `kernels/cuda/rows.cuh` stages its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// In kernels' names.
    pub name: &'static str,
    len: u64,
    bytes: u64,
    /// What divides every block's address.
    align: u64,
    /// Integers of a block that stand beside the codes in shared memory.
    starts: u64,
}

pub const Q4_K: Format = Format { name: "q4_k", len: 256, bytes: 144, align: 16, starts: 8 };
pub const Q6_K: Format = Format { name: "q6_k", len: 256, bytes: 210, align: 2, starts: 16 };
pub const Q8_0: Format = Format { name: "q8_0", len: 32, bytes: 34, align: 2, starts: 0 };
pub const MXFP4: Format = Format { name: "mxfp4", len: 32, bytes: 17, align: 1, starts: 0 };

impl Format {
    /// Of a row, in whole blocks.
    fn row_bytes(self, cols: u64) -> u64 {
        cols / self.len * self.bytes
    }

    /// Blocks of a row that are staged at once.
    fn step(self) -> u64 {
        match (self.len, self.bytes) {
            (256, _) => 8,
            (_, 25..) => 32,
            _ => 64,
        }
    }

    /// Bytes of shared memory: what a warp stages, and a token's activations.
    fn stage(self) -> (u64, u64) {
        let step = self.step();
        let pitch = (step * self.bytes + 16 - self.align + 31) / 64 * 64 + 32;
        let run = (32 * self.bytes + 16 - self.align).next_multiple_of(16);
        ((4 * pitch).max(run), step * (self.len + 16 + 4 * self.starts + 4))
    }
}

/// What a launch does.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Products of rows with one token: of `count` matrices (experts), or of
    /// as many pairs that share warps.
    Rows { format: Format, rows: u64, cols: u64, count: u64, paired: bool },
    /// A router of F32 rows.
    Router { experts: u64, hidden: u64 },
    /// One query's heads over `positions` cells of f16.
    Attend { heads: u64, kv_heads: u64, key: u64, value: u64, positions: u64 },
    /// The largest of so many logits.
    Argmax { logits: u64 },
}

/// How it is launched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    pub file: &'static str,
    pub kernel: String,
    pub blocks: u64,
    pub threads: u32,
    pub dynamic_shared_bytes: u32,
    /// Bytes that a thread has asked for and not got, on average. What is
    /// staged and then computed counts half; of two stages, one counts.
    pub in_flight: u32,
}

const WARP_ROWS: u64 = 4;

impl Work {
    /// What must move: weights or cells once, and what is small beside them.
    pub fn bytes(self) -> u64 {
        match self {
            Work::Rows { format, rows, cols, count, paired } => {
                let matrices = count * if paired { 2 } else { 1 };
                let weights = matrices * rows * format.row_bytes(cols);
                weights + count * (cols * 5 / 4 + 4 * rows)
            }
            Work::Router { experts, hidden } => 4 * hidden * (experts + 2),
            Work::Attend { heads, kv_heads, key, value, positions } => {
                2 * kv_heads * positions * (key + value) + 4 * heads * (key + value)
            }
            Work::Argmax { logits } => 4 * logits,
        }
    }

    /// For a device of so many multiprocessors.
    pub fn cut(self, multiprocessors: u64) -> Cut {
        match self {
            Work::Rows { format, rows, cols, count, paired } => {
                let blocks_of_row = cols / format.len;
                let each = if blocks_of_row < 8 { 32 / blocks_of_row } else { WARP_ROWS };
                let (warp, token) = format.stage();
                let fewest = if paired { 2 } else { 1 };
                let shared = |warps: u64| warps * warp + token + warps * 32 * 4;
                let blocks = |warps: u64| rows.div_ceil(warps / fewest * each);
                let mut warps = 8;
                while warps > fewest
                    && (shared(warps) > 47 << 10 || blocks(warps) * count < 2 * multiprocessors)
                {
                    warps /= 2;
                }
                let (file, name) = match (paired, count) {
                    (true, _) => ("experts", "expert_gate_up"),
                    (false, 1) => ("dense", "gemv"),
                    (false, _) => ("experts", "expert_down"),
                };
                Cut {
                    file,
                    kernel: format!("{name}_{}", format.name),
                    blocks: blocks(warps) * count,
                    threads: 32 * warps as u32,
                    dynamic_shared_bytes: shared(warps) as u32,
                    in_flight: (each * blocks_of_row.min(format.step()) * format.bytes / 32 / 2)
                        as u32,
                }
            }
            Work::Router { experts, .. } => Cut {
                file: "router",
                kernel: "router_step".to_string(),
                blocks: experts.div_ceil(4),
                threads: 128,
                dynamic_shared_bytes: 0,
                in_flight: 64,
            },
            Work::Attend { heads, kv_heads, key, positions, .. } => {
                let (queries, chunks) = (heads / kv_heads, positions.div_ceil(256));
                let shared = |tile: u64| (32 << 10) + 4 * tile * (key + 256);
                let largest =
                    [8, 4].into_iter().find(|tile| shared(*tile) <= 48 << 10).unwrap_or(1);
                let blocks = |tile: u64| chunks * kv_heads * queries.div_ceil(tile);
                let tile = match queries {
                    0..=1 => 1,
                    2..=4 => largest.min(4),
                    _ if blocks(largest) >= multiprocessors => largest,
                    _ => largest.min(4),
                };
                Cut {
                    file: "attention",
                    kernel: format!("attend_f16_q{tile}"),
                    blocks: blocks(tile),
                    threads: 128,
                    dynamic_shared_bytes: shared(tile) as u32,
                    in_flight: 128,
                }
            }
            Work::Argmax { logits } => Cut {
                file: "logits",
                kernel: "logits_argmax".to_string(),
                blocks: logits.div_ceil(2048).min(256),
                threads: 256,
                dynamic_shared_bytes: 0,
                in_flight: 16,
            },
        }
    }
}

/// A launch of a token, and how many such there are.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub what: &'static str,
    pub times: u64,
    pub work: Work,
}

#[derive(Clone, Debug)]
pub struct Model {
    pub name: &'static str,
    pub steps: Vec<Step>,
}

/// Positions that attention sees in the page.
pub const POSITIONS: u64 = 4096;

fn gemv(what: &'static str, times: u64, format: Format, rows: u64, cols: u64) -> Step {
    Step { what, times, work: Work::Rows { format, rows, cols, count: 1, paired: false } }
}

/// Router, gate-up and down of `k` of `experts` in `layers` layers.
fn experts(
    layers: u64,
    (count, k): (u64, u64),
    (hidden, inner): (u64, u64),
    (up, down): (Format, Format),
) -> [Step; 3] {
    let rows = |format, rows, cols, paired| Work::Rows { format, rows, cols, count: k, paired };
    let step = |what, work| Step { what, times: layers, work };
    [
        step("router", Work::Router { experts: count, hidden }),
        step("gate, up", rows(up, inner, hidden, true)),
        step("down", rows(down, hidden, inner, false)),
    ]
}

fn attend(layers: u64, heads: u64, kv_heads: u64, key: u64, value: u64) -> Step {
    let work = Work::Attend { heads, kv_heads, key, value, positions: POSITIONS };
    Step { what: "attention", times: layers, work }
}

fn head(format: Format, vocabulary: u64, hidden: u64) -> [Step; 2] {
    let argmax = Step { what: "argmax", times: 1, work: Work::Argmax { logits: vocabulary } };
    [gemv("head", 1, format, vocabulary, hidden), argmax]
}

/// The models of the issue.
pub fn models() -> Vec<Model> {
    let model = |name, parts: &[&[Step]]| Model { name, steps: parts.concat() };
    vec![
        model(
            "OLMoE-1B-7B, Q4_K_M",
            &[
                &[gemv("q, k", 32, Q4_K, 2048, 2048), gemv("v", 16, Q6_K, 2048, 2048)],
                &[attend(16, 16, 16, 128, 128), gemv("output", 16, Q4_K, 2048, 2048)],
                &experts(16, (64, 8), (2048, 1024), (Q4_K, Q6_K)),
                &head(Q6_K, 50304, 2048),
            ],
        ),
        model(
            "Qwen3-30B-A3B, Q4_K_M",
            &[
                &[gemv("q", 48, Q4_K, 4096, 2048), gemv("k", 48, Q4_K, 512, 2048)],
                &[gemv("v", 48, Q6_K, 512, 2048), attend(48, 32, 4, 128, 128)],
                &[gemv("output", 48, Q4_K, 2048, 4096)],
                &experts(48, (128, 8), (2048, 768), (Q4_K, Q6_K)),
                &head(Q6_K, 151_936, 2048),
            ],
        ),
        model(
            "Mixtral-8x7B, Q4_K_M",
            &[
                &[gemv("q", 32, Q4_K, 4096, 4096), gemv("k, v", 64, Q8_0, 1024, 4096)],
                &[attend(32, 32, 8, 128, 128), gemv("output", 32, Q4_K, 4096, 4096)],
                &experts(32, (8, 2), (4096, 14336), (Q4_K, Q6_K)),
                &head(Q6_K, 32000, 4096),
            ],
        ),
        model(
            "gpt-oss-20b, MXFP4",
            &[
                &[gemv("q", 24, Q8_0, 4096, 2880), gemv("k, v", 48, Q8_0, 512, 2880)],
                &[attend(12, 64, 8, 64, 64), gemv("output", 24, Q8_0, 2880, 4096)],
                &experts(24, (32, 4), (2880, 2880), (MXFP4, MXFP4)),
                &head(Q8_0, 201_088, 2880),
            ],
        ),
        model(
            "DeepSeek-V2-Lite, Q4_K_M",
            &[
                &[gemv("q", 27, Q4_K, 3072, 2048), gemv("latent", 27, Q4_K, 576, 2048)],
                &[attend(27, 16, 1, 576, 512), gemv("output", 27, Q4_K, 2048, 2048)],
                &experts(26, (64, 6), (2048, 1408), (Q4_K, Q8_0)),
                &head(Q6_K, 102_400, 2048),
            ],
        ),
        model(
            "Qwen3.5-35B-A3B, Q4_K_M",
            &[
                &[gemv("q, gate", 10, Q4_K, 8192, 2048), gemv("k", 10, Q4_K, 512, 2048)],
                &[gemv("v", 10, Q6_K, 512, 2048), attend(10, 16, 2, 256, 256)],
                &[gemv("output", 40, Q4_K, 2048, 4096)],
                &[gemv("DeltaNet q, k, v", 30, Q4_K, 8192, 2048)],
                &[gemv("DeltaNet gate", 30, Q4_K, 4096, 2048)],
                &experts(40, (256, 8), (2048, 512), (Q4_K, Q6_K)),
                &head(Q6_K, 248_320, 2048),
            ],
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_known_tensors() {
        let rows = |format, rows, cols, count, paired| {
            Work::Rows { format, rows, cols, count, paired }.bytes()
        };
        // 8 experts of 768 x 2048 twice in Q4_K, activations and answers.
        assert_eq!(rows(Q4_K, 768, 2048, 8, true), 8 * (2 * 768 * 1152 + 2560 + 3072));
        assert_eq!(rows(MXFP4, 2880, 2880, 1, false), 2880 * 1530 + 3600 + 11520);
        let attend = Work::Attend { heads: 32, kv_heads: 4, key: 128, value: 128, positions: 4096 };
        assert_eq!(attend.bytes(), 4 * 4096 * 256 * 2 + 32 * 256 * 4);
    }

    /// The same figures as in `kernels/src/cuda/rows.rs`.
    #[test]
    fn stages_are_those_of_the_kernels() {
        assert_eq!(Q8_0.stage(), (4480, 1664));
        assert_eq!(MXFP4.stage(), (4480, 3328));
        assert_eq!(Q4_K.stage(), (4736, 2464));
        assert_eq!(Q6_K.stage(), (6784, 2720));
    }

    #[test]
    fn launches_are_cut_for_the_device() {
        let work = Work::Rows { format: Q4_K, rows: 768, cols: 2048, count: 8, paired: true };
        // 8 warps would take 8 * 4736 + 2464 + 1024 bytes: they fit 47 KiB.
        let cut = work.cut(128);
        assert_eq!(
            (cut.kernel.as_str(), cut.threads, cut.blocks),
            ("expert_gate_up_q4_k", 256, 384)
        );
        assert_eq!(cut.dynamic_shared_bytes, 8 * 4736 + 2464 + 1024);
        assert_eq!(cut.in_flight, 4 * 8 * 144 / 64);
        // Of few rows the blocks get smaller, down to a warp.
        let work = Work::Rows { format: Q6_K, rows: 512, cols: 2048, count: 1, paired: false };
        assert_eq!((work.cut(128).threads, work.cut(128).blocks), (32, 128));
        let work = Work::Attend { heads: 32, kv_heads: 4, key: 128, value: 128, positions: 4096 };
        assert_eq!(work.cut(64).kernel, "attend_f16_q8");
        assert_eq!(work.cut(128).kernel, "attend_f16_q4");
    }

    #[test]
    fn every_row_has_whole_blocks() {
        for model in models() {
            for step in model.steps {
                if let Work::Rows { format, cols, .. } = step.work {
                    assert_eq!(cols % format.len, 0, "{}: {}", model.name, step.what);
                }
            }
        }
    }
}
