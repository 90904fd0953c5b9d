//! Sizes of published models, for traces that do not say how many bytes an
//! expert has.

use pregate_predictor::{LayerShape, Shape};

/// A published model in a usual quantisation. Sizes are from its configuration
/// (`config.json`), bits from files of that quantisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KnownModel {
    pub name: &'static str,
    /// How its name is recognised: every part, in small letters.
    marks: &'static [&'static str],
    pub layers: usize,
    /// The first so many have no routed experts.
    pub dense_layers: usize,
    pub experts: usize,
    pub top_k: usize,
    pub hidden: usize,
    /// Of a routed expert.
    pub inner: usize,
    /// Millions of weights that every token reads: attention, routers, shared
    /// experts, dense layers, head; not the embedding.
    other_millions: f64,
    /// Keys and values of one position in f16, as read for a token: of
    /// layers that slide, a half.
    pub kv_bytes: u64,
    /// Bits of a weight of routed experts, and of the others.
    expert_bits: f64,
    other_bits: f64,
    pub quantisation: &'static str,
    /// Billions of weights as published, all and of a token: what the table
    /// is checked with.
    published: (f64, f64),
    vocabulary: usize,
}

/// Bits of Q4_K_M: half of the downs are Q6_K.
const Q4_K_M: f64 = 4.84;
/// What the rest of such a file has on average.
const REST: f64 = 5.0;

#[rustfmt::skip]
const MODELS: [KnownModel; 9] = [
    KnownModel { name: "gpt-oss-20b", marks: &["gpt-oss", "-20b"], layers: 24, dense_layers: 0,
        experts: 32, top_k: 4, hidden: 2880, inner: 2880, other_millions: 1218.0, kv_bytes: 24_576,
        expert_bits: 4.25, other_bits: 8.5, quantisation: "MXFP4, the rest Q8_0",
        published: (20.9, 3.6), vocabulary: 201_088 },
    KnownModel { name: "gpt-oss-120b", marks: &["gpt-oss", "-120b"], layers: 36, dense_layers: 0,
        experts: 128, top_k: 4, hidden: 2880, inner: 2880, other_millions: 1548.0, kv_bytes: 36_864,
        expert_bits: 4.25, other_bits: 8.5, quantisation: "MXFP4, the rest Q8_0",
        published: (116.8, 5.1), vocabulary: 201_088 },
    KnownModel { name: "qwen3-30b-a3b", marks: &["qwen3", "30b-a3b"], layers: 48, dense_layers: 0,
        experts: 128, top_k: 8, hidden: 2048, inner: 768, other_millions: 1230.0, kv_bytes: 98_304,
        expert_bits: Q4_K_M, other_bits: REST, quantisation: "Q4_K_M",
        published: (30.5, 3.3), vocabulary: 151_936 },
    KnownModel { name: "qwen3-235b-a22b", marks: &["qwen3", "235b-a22b"], layers: 94, dense_layers: 0,
        experts: 128, top_k: 8, hidden: 4096, inner: 1536, other_millions: 7375.0, kv_bytes: 192_512,
        expert_bits: Q4_K_M, other_bits: REST, quantisation: "Q4_K_M",
        published: (235.0, 22.0), vocabulary: 151_936 },
    KnownModel { name: "olmoe", marks: &["olmoe"], layers: 16, dense_layers: 0,
        experts: 64, top_k: 8, hidden: 2048, inner: 1024, other_millions: 374.0, kv_bytes: 131_072,
        expert_bits: Q4_K_M, other_bits: REST, quantisation: "Q4_K_M",
        published: (6.9, 1.3), vocabulary: 50_304 },
    KnownModel { name: "deepseek-v2-lite", marks: &["deepseek-v2-lite"], layers: 27, dense_layers: 1,
        experts: 64, top_k: 6, hidden: 2048, inner: 1408, other_millions: 1102.0, kv_bytes: 31_104,
        // Rows of 1408 are no whole blocks of 256, so that some stay larger.
        expert_bits: 5.28, other_bits: 5.28, quantisation: "Q4_K_M",
        published: (15.7, 2.4), vocabulary: 102_400 },
    KnownModel { name: "mixtral-8x7b", marks: &["mixtral", "8x7b"], layers: 32, dense_layers: 0,
        experts: 8, top_k: 2, hidden: 4096, inner: 14_336, other_millions: 1474.0, kv_bytes: 131_072,
        expert_bits: 4.5, other_bits: REST, quantisation: "Q4_K_M",
        published: (46.7, 12.9), vocabulary: 32_000 },
    KnownModel { name: "glm-4.5-air", marks: &["glm-4.5-air"], layers: 46, dense_layers: 1,
        experts: 128, top_k: 8, hidden: 4096, inner: 1408, other_millions: 6570.0, kv_bytes: 188_416,
        expert_bits: 5.0, other_bits: REST, quantisation: "Q4_K_M",
        published: (106.0, 12.0), vocabulary: 151_552 },
    KnownModel { name: "deepseek-v3", marks: &["deepseek-v3"], layers: 61, dense_layers: 3,
        experts: 256, top_k: 8, hidden: 7168, inner: 2048, other_millions: 16_180.0, kv_bytes: 70_272,
        expert_bits: Q4_K_M, other_bits: REST, quantisation: "Q4_K_M",
        published: (671.0, 37.0), vocabulary: 129_280 },
];

/// The models that have a name.
pub fn names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|model| model.name)
}

/// The model that a name means: "openai/gpt-oss-20b", "Qwen3-30B-A3B-Instruct".
pub fn by_name(text: &str) -> Option<&'static KnownModel> {
    let text = text.to_lowercase().replace(['_', ' '], "-");
    MODELS.iter().find(|model| model.marks.iter().all(|mark| text.contains(mark)))
}

impl KnownModel {
    /// Weights of an expert.
    fn expert_weights(&self) -> f64 {
        3.0 * self.hidden as f64 * self.inner as f64
    }

    pub fn expert_bytes(&self) -> u64 {
        (self.expert_weights() * self.expert_bits / 8.0) as u64
    }

    /// Everything else that is read for a token, without keys and values.
    pub fn other_bytes(&self) -> u64 {
        (self.other_millions * 1e6 * self.other_bits / 8.0) as u64
    }

    /// With dense layers before the others.
    pub fn shape(&self) -> Shape {
        let Self { layers, dense_layers, experts, top_k, .. } = *self;
        let moe = LayerShape { experts, top_k, expert_bytes: self.expert_bytes(), class: 0 };
        let layer = |index| (index >= dense_layers).then_some(moe);
        Shape { layers: (0..layers).map(layer).collect() }
    }

    /// Whether routers of such layers can be this model's: as many MoE layers,
    /// experts and top-k. Dense ones are not always in a trace.
    pub fn fits(&self, shape: &Shape) -> bool {
        let is_one =
            |layer: &LayerShape| layer.experts == self.experts && layer.top_k == self.top_k;
        shape.moe().count() == self.layers - self.dense_layers
            && shape.moe().all(|(_, layer)| is_one(layer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_sizes_add_up_to_what_is_published() {
        for model in &MODELS {
            let moe_layers = (model.layers - model.dense_layers) as f64;
            let each = model.expert_weights() / 1e9;
            let other = model.other_millions / 1e3;
            let embedding = (model.vocabulary * model.hidden) as f64 / 1e9;
            let (all, active) = model.published;
            let total = moe_layers * model.experts as f64 * each + other + embedding;
            assert!((total / all - 1.0).abs() < 0.01, "{}: {total} of {all}", model.name);
            // Some count the embedding of a token, some do not.
            let used = moe_layers * model.top_k as f64 * each + other;
            assert!(
                used < active * 1.07 && used + embedding > active * 0.97,
                "{}: {used} of {active}",
                model.name
            );
            assert!(model.fits(&model.shape()));
        }
    }

    #[test]
    fn bytes_are_those_of_files() {
        // limits.md section 3: 13.2 and 99.1 MB, 1.64 GB.
        let of = |name| by_name(name).unwrap();
        assert_eq!(of("gpt-oss-20b").expert_bytes(), 3 * 2880 * 2880 * 17 / 32);
        assert_eq!(of("mixtral-8x7b").expert_bytes() / 100_000, 990);
        assert_eq!(of("gpt-oss-120b").other_bytes() / 10_000_000, 164);
    }

    #[test]
    fn models_are_recognised_by_their_usual_names() {
        for (text, name) in [
            ("openai/gpt-oss-20b", "gpt-oss-20b"),
            ("GPT_OSS 120B", "gpt-oss-120b"),
            ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
            ("deepseek-ai/ESFT-vanilla-lite (DeepSeek-V2-Lite family)", "deepseek-v2-lite"),
            ("allenai/OLMoE-1B-7B-0924", "olmoe"),
        ] {
            assert_eq!(by_name(text).map(|model| model.name), Some(name));
        }
        assert!(names().all(|name| by_name(name).is_some_and(|model| model.name == name)));
        assert_eq!(by_name(""), None);
        assert_eq!(by_name("gpt-oss"), None, "which of the two?");
        let small = by_name("gpt-oss-20b").unwrap();
        assert!(!small.fits(&by_name("gpt-oss-120b").unwrap().shape()));
        let anonymous = Shape::uniform(26, 64, 6, 0);
        assert!(by_name("deepseek-v2-lite").unwrap().fits(&anonymous), "without its dense layer");
    }
}
