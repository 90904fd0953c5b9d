//! Files that parse and describe an impossible model: the cases of the
//! loader (G36-G45, C01-C06). Each must be refused with a message that names
//! the file, what was found and what is allowed; none may panic.

#[path = "support/gguf_builder.rs"]
mod gguf_builder;
#[path = "support/golden.rs"]
#[allow(dead_code)]
mod golden;
#[path = "support/scratch.rs"]
mod scratch;

use gguf_builder::{self as build, Gguf, Val};
use pregate_kernels::{Format, Reference};
use pregate_runtime::{Error, LoadOptions, Model, Residency, Session, SessionOptions};
use scratch::Scratch;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

fn load(path: &Path) -> Result<Model, Error> {
    Model::load(
        path,
        LoadOptions { backend: Arc::new(Reference), residency: Residency::Lazy },
        &mut |_| {},
    )
}

/// The message, if it is of the right form.
fn refusal(path: &Path, what: &str) -> String {
    let error = match load(path) {
        Ok(_) => panic!("{what}: was accepted"),
        Err(error) => error,
    };
    let text = error.to_string();
    assert!(text.contains(&*path.to_string_lossy()), "{what}: no file in: {text}");
    let says_both = text.contains("found ") && text.contains("allowed: ");
    assert!(says_both || text.contains("supported: "), "{what}: {text}");
    text
}

fn template(name: &str) -> Gguf {
    let path = golden::find(&format!("gguf/{name}.gguf")).expect("a golden file");
    Gguf::from_bytes(&std::fs::read(path).unwrap())
}

#[test]
fn gguf_descriptions_out_of_range_are_refused() {
    let scratch = Scratch::new("bad-models-gguf");
    let arch = "qwen3moe";
    let key = |name: &str| format!("{arch}.{name}");
    let cases: Vec<(&str, String, Val)> = vec![
        ("G41 no expert used", key("expert_used_count"), build::u32(0)),
        ("G41 more used than there are", key("expert_used_count"), build::u32(17)),
        ("G41 negative", key("expert_used_count"), build::i32(-1)),
        ("G36 expert count", key("expert_count"), build::u32(15)),
        ("G42 no layer", key("block_count"), build::u32(0)),
        ("G42 2^31 layers", key("block_count"), build::u32(1 << 31)),
        ("G37 a layer is missing", key("block_count"), build::u32(4)),
        ("a layer too many in the file", key("block_count"), build::u32(2)),
        ("G43 epsilon NaN", key("attention.layer_norm_rms_epsilon"), build::f32(f32::NAN)),
        ("G43 epsilon 0", key("attention.layer_norm_rms_epsilon"), build::f32(0.0)),
        ("G43 rope base inf", key("rope.freq_base"), build::f32(f32::INFINITY)),
        ("G43 rope base 0", key("rope.freq_base"), build::f32(0.0)),
        ("G44 context 0", key("context_length"), build::u32(0)),
        ("G44 context 2^40", key("context_length"), build::u64(1 << 40)),
        ("heads 0", key("attention.head_count"), build::u32(0)),
        ("kv heads 3 of 4", key("attention.head_count_kv"), build::u32(3)),
        ("head size 0", key("attention.key_length"), build::u32(0)),
        ("head size of another model", key("attention.key_length"), build::u32(16)),
        ("width as text", key("embedding_length"), build::string("64")),
        ("width of another model", key("embedding_length"), build::u32(96)),
        ("unknown architecture", "general.architecture".into(), build::string("mamba9")),
        ("dense llama", "general.architecture".into(), build::string("llama")),
    ];
    for (index, (what, key, value)) in cases.into_iter().enumerate() {
        let file = template("qwen3_moe.Q8_0").replace(&key, value).build();
        let path = scratch.write(&format!("case-{index}.gguf"), &file);
        let text = refusal(&path, what);
        if what.contains("architecture") {
            assert!(text.contains("qwen3moe") && text.contains("deepseek2"), "{text}");
        }
    }
}

#[test]
fn gguf_tensors_that_do_not_fit_are_refused() {
    let scratch = Scratch::new("bad-models-tensors");
    let rename = |name: &str, to: &str| {
        let mut file = template("qwen3_moe.Q8_0");
        file.tensor_mut(name).name = to.as_bytes().to_vec();
        file
    };
    let mut unknown_bias = template("qwen3_moe.Q8_0");
    unknown_bias = unknown_bias.f32_tensor("blk.0.attn_mystery.bias", &[64], &[0.0; 64]);
    let merged =
        template("qwen3_moe.Q8_0").f32_tensor("blk.0.ffn_gate.0.weight", &[2, 2], &[0.0; 4]);
    let v3_without_scoring = template("deepseek_v3.Q8_0").remove("deepseek2.expert_gating_func");
    let cases = [
        ("a missing matrix", rename("blk.1.attn_q.weight", "blk.1.attn_x.weight")),
        ("a missing expert bank", rename("blk.1.ffn_up_exps.weight", "blk.1.ffn_zp_exps.weight")),
        ("a tensor that nothing reads", unknown_bias),
        ("G38 split and merged experts", merged),
        ("DeepSeek-V3 without its scoring rule", v3_without_scoring),
    ];
    for (index, (what, file)) in cases.into_iter().enumerate() {
        refusal(&scratch.write(&format!("case-{index}.gguf"), &file.build()), what);
    }
}

#[test]
fn damaged_weights_end_with_an_error_and_not_with_nonsense() {
    let scratch = Scratch::new("bad-models-nan");
    for (index, scale) in [f32::NAN, f32::INFINITY].into_iter().enumerate() {
        let mut file = template("qwen3_moe.Q8_0");
        let data = &mut file.tensor_mut("blk.0.ffn_down_exps.weight").data;
        let bits = half::f16::from_f32(scale).to_le_bytes();
        for block in data.chunks_exact_mut(Format::Q8_0.block_bytes()) {
            block[..2].copy_from_slice(&bits);
        }
        let path = scratch.write(&format!("case-{index}.gguf"), &file.build());
        let model = load(&path).expect("scales are not looked at while loading");
        let mut session = Session::new(&model, SessionOptions::default()).unwrap();
        let error = session.feed_quietly(&[1, 2, 3]).expect_err("NaN logits");
        assert!(matches!(error, Error::NotFinite { position: 2, .. }), "{error}");
    }
}

/// A folder with the configuration of a golden case, changed.
fn folder(
    scratch: &Scratch,
    name: &str,
    case: &str,
    change: impl FnOnce(&mut Value),
) -> std::path::PathBuf {
    let source = golden::find(&format!("hf/{case}/config.json")).expect("a golden folder");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&source).unwrap()).unwrap();
    change(&mut config);
    let path = scratch.write(&format!("{name}/config.json"), config.to_string().as_bytes());
    let folder = path.parent().unwrap().to_path_buf();
    std::fs::copy(source.with_file_name("model.safetensors"), folder.join("model.safetensors"))
        .unwrap();
    folder
}

#[test]
fn configurations_out_of_range_are_refused() {
    let scratch = Scratch::new("bad-models-config");
    let set = |key: &'static str, value: Value| move |config: &mut Value| config[key] = value;
    let cases: Vec<(&str, &str, Value)> = vec![
        ("C02 negative", "num_hidden_layers", json!(-3)),
        ("C02 float", "num_attention_heads", json!(4.5)),
        ("C02 text", "hidden_size", json!("64")),
        ("C03 too many experts a token", "num_experts_per_tok", json!(1000)),
        ("C03 none", "num_experts_per_tok", json!(0)),
        ("C05 unknown architecture", "model_type", json!("mamba9")),
        ("C05 no architecture", "model_type", Value::Null),
        ("C06 unknown quantisation", "quantization_config", json!({"quant_method": "gptq"})),
        ("activation", "hidden_act", json!("relu")),
        ("epsilon", "rms_norm_eps", json!(0.0)),
        ("rope kind", "rope_parameters", json!({"rope_type": "dynamic", "rope_theta": 1e4})),
        ("rope base", "rope_parameters", json!({"rope_type": "default", "rope_theta": -1})),
        ("layers of another model", "num_hidden_layers", json!(2)),
        ("width of another model", "hidden_size", json!(128)),
        ("experts of another model", "n_routed_experts", json!(8)),
        ("groups that do not divide", "n_group", json!(3)),
        ("scoring", "scoring_func", json!("softmax")),
        ("vocabulary", "vocab_size", json!(1u64 << 40)),
    ];
    for (index, (what, key, value)) in cases.into_iter().enumerate() {
        let folder = folder(&scratch, &format!("case-{index}"), "deepseek_v3", set(key, value));
        refusal(&folder, what);
    }
    let heads = folder(&scratch, "heads", "glm4_moe", set("num_key_value_heads", json!(3)));
    refusal(&heads, "C04 kv heads that do not divide");
}

/// Every number of a description replaced by extremes, one at a time and in
/// pairs: an error or a model, never a panic.
#[test]
fn no_number_of_a_description_can_panic_the_loader() {
    let scratch = Scratch::new("bad-models-extremes");
    let extremes = [
        json!(0),
        json!(1),
        json!(2),
        json!(3),
        json!(255),
        json!(u32::MAX),
        json!(u64::MAX),
        json!(-1),
        json!(0.5),
        json!(1e308),
        json!(1e-308),
        json!([]),
        json!({}),
        json!("x"),
        Value::Null,
    ];
    let mut loaded = 0;
    let mut refused = 0;
    for case in
        ["deepseek_v3", "gpt_oss_mxfp4", "qwen3_5_moe_text", "phimoe_longrope", "granitemoeshared"]
    {
        let folder = folder(&scratch, case, case, |_| {});
        let path = folder.join("config.json");
        let original: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let keys: Vec<String> = original.as_object().unwrap().keys().cloned().collect();
        let mut try_one = |config: &Value| {
            std::fs::write(&path, config.to_string()).unwrap();
            match load(&folder) {
                Ok(_) => loaded += 1,
                Err(_) => refused += 1,
            }
        };
        for (index, key) in keys.iter().enumerate() {
            for (number, extreme) in extremes.iter().enumerate() {
                let mut config = original.clone();
                config[key] = extreme.clone();
                try_one(&config);
                // And beside it another key, chosen by the loop's numbers.
                let other = &keys[(index * 7 + number * 3) % keys.len()];
                config[other] = extremes[(index + number) % extremes.len()].clone();
                try_one(&config);
            }
        }
    }
    assert!(refused > 1000 && loaded > 100, "{refused} refused, {loaded} loaded");
}
