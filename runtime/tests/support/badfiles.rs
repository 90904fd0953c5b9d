//! Files that must be refused: the named cases G01 to G35 (GGUF) and S01 to
//! S13 (safetensors), each as bytes. Cases that need several files (split
//! models, folders) are in `bad_folders.rs`; those that only a model
//! loader can see (G36 to G45) are the loader's.
#![allow(dead_code, reason = "each test binary uses a part")]

use crate::gguf_builder::{self as gguf, Gguf, array, raw, string, text};
use pregate_kernels::Format;

pub struct Case {
    pub id: &'static str,
    pub bytes: Vec<u8>,
    /// What the message must say.
    pub mentions: Vec<&'static str>,
}

fn case(id: &'static str, bytes: impl Into<Vec<u8>>, mentions: &[&'static str]) -> Case {
    Case { id, bytes: bytes.into(), mentions: mentions.to_vec() }
}

/// A small good file with every type of value and two formats of tensors.
pub fn good_gguf() -> Gguf {
    let q4k = Format::Q4K.row_bytes(256).unwrap();
    Gguf::new()
        .key("general.architecture", string("qwen3moe"))
        .key("general.alignment", gguf::u32(32))
        .key("a.u8", raw(0, [7]))
        .key("a.i8", raw(1, [0xf9]))
        .key("a.u16", raw(2, 700_u16.to_le_bytes()))
        .key("a.i16", raw(3, (-700_i16).to_le_bytes()))
        .key("a.i32", gguf::i32(-70_000))
        .key("a.f32", gguf::f32(1e-6))
        .key("a.bool", gguf::bool(true))
        .key("a.u64", gguf::u64(1 << 40))
        .key("a.i64", raw(11, (-1_i64 << 40).to_le_bytes()))
        .key("a.f64", raw(12, 0.1_f64.to_le_bytes()))
        .key("tokenizer.ggml.tokens", gguf::strings(&["<s>", "", "größer", "a"]))
        .key("tokenizer.ggml.scores", gguf::f32s(&[0.0, -1.0, -2.5, -3.0]))
        .key("tokenizer.ggml.token_type", gguf::i32s(&[3, 1, 1, 1]))
        .key("a.bools", gguf::bools(&[true, false]))
        .tensor("blk.0.attn_q.weight", Format::Q4K, &[3, 256], vec![1; 3 * q4k])
        .f32_tensor("output_norm.weight", &[5], &[1.0; 5])
        .f32_tensor("token_embd.weight", &[2, 3, 4], &[0.5; 24])
}

fn with_tensor(kind: u32, dims: &[u64]) -> Vec<u8> {
    Gguf::new().raw_tensor("token_embd.weight", kind, dims, vec![0; 64]).build()
}

fn with_key(key: &str, value: gguf::Val) -> Vec<u8> {
    // Without padding, which could pass for what is missing.
    Gguf::new().key(key, value).header()
}

fn with_name(name: &str) -> Vec<u8> {
    Gguf::new().f32_tensor(name, &[8], &[0.0; 8]).build()
}

fn edited(edit: impl FnOnce(&mut Gguf)) -> Vec<u8> {
    let mut file = good_gguf();
    edit(&mut file);
    file.build()
}

pub fn gguf_cases() -> Vec<Case> {
    let mut cases = vec![case("G01", [], &["0 bytes"])];
    cases.extend((1..24).map(|len| {
        let field = match len {
            0..4 => "magic",
            4..8 => "version",
            8..16 => "number of tensors",
            // The first count is there and the bytes that it counts are not.
            _ => "number of tensors: found 3; allowed: at most 0",
        };
        case("G02", &good_gguf().build()[..len], &[field])
    }));
    cases.extend(header_cases());
    cases.extend(key_cases());
    cases.extend(tensor_cases());
    cases.extend(data_cases());
    cases
}

fn header_cases() -> Vec<Case> {
    let version = |version| edited(|file| file.version = version);
    let mut many = Gguf::new();
    many.n_tensors = Some(65_537);
    vec![
        case("G03", edited(|file| file.magic = *b"GGML"), &["at byte 0", "magic", "GGUF"]),
        case("G03", edited(|file| file.magic = *b"FUGG"), &["at byte 0", "magic"]),
        case("G04", version(0), &["version", "0 at byte 4", "2, 3"]),
        case("G04", version(1), &["version", "1 at byte 4", "2, 3"]),
        case("G04", version(4), &["version", "4 at byte 4", "2, 3"]),
        case("G05", version(3_u32.swap_bytes()), &["3 in big-endian byte order", "little-endian"]),
        case("G05", version(2_u32.swap_bytes()), &["2 in big-endian byte order"]),
        case(
            "G06",
            edited(|file| file.n_tensors = Some(u64::MAX)),
            &["at byte 8", "number of tensors", "18446744073709551615", "65536"],
        ),
        case(
            "G07",
            edited(|file| file.n_keys = Some(u64::MAX)),
            &["at byte 16", "number of keys", "18446744073709551615", "65536"],
        ),
        case("G08", many.build(), &["at byte 8", "65537", "65536"]),
        case(
            "G08 within the limit, not within the file",
            edited(|file| file.n_tensors = Some(65_000)),
            &["at byte 8", "65000", "bytes left can hold"],
        ),
    ]
}

fn key_cases() -> Vec<Case> {
    let long_key = [
        &good_gguf().header()[..8],
        &0_u64.to_le_bytes(),
        &1_u64.to_le_bytes(),
        &u64::MAX.to_le_bytes(),
        b"general.architecture____",
    ]
    .concat();
    let nested = array(9, 1, array(9, 1, []).bytes);
    let deep = (0..10_000).fold(array(0, 0, []), |inner, _| array(9, 1, inner.bytes));
    let mut not_text = Gguf::new();
    not_text.keys.push((b"general.\xff".to_vec(), gguf::u32(1)));
    let alignment = |value| with_key("general.alignment", value);
    vec![
        case("G09", long_key, &["at byte 24", "18446744073709551615", "65536"]),
        case("G09 one more than allowed", with_key(&"k".repeat(65_537), gguf::u32(1)), &["65537"]),
        case("G10", with_key("", gguf::u32(1)), &["at byte 24", "empty name"]),
        case(
            "G11",
            edited(|file| file.keys.push(file.keys[0].clone())),
            &["general.architecture", "second value"],
        ),
        case("G12", with_key("a", raw(13, [0; 8])), &["at byte 33", "number 13", "0 to 12"]),
        case("G13", with_key("a", nested), &["an array of array", "allowed"]),
        case("G13 deep", with_key("a", deep), &["an array of array"]),
        case("G14", with_key("a", array(4, 1 << 62, [0; 8])), &["4611686018427387904", "at most"]),
        case("G14 strings", with_key("a", array(8, 1 << 62, [0; 8])), &["at most"]),
        case(
            "G14 product wraps to 8",
            with_key("a", array(10, (1 << 61) + 1, [0; 8])),
            &["at most"],
        ),
        case(
            "G15",
            with_key("a", raw(8, [&4_u64.to_le_bytes()[..], b"abc"].concat())),
            &["4 bytes wanted", "at most 3"],
        ),
        case("G15 long", with_key("a", raw(8, (17_u64 << 20).to_le_bytes())), &["16777216"]),
        case("G16 key", not_text.build(), &["at byte 40", "UTF-8"]),
        case("G16 value", with_key("a", raw(8, text(b"ok\xc3"))), &["at byte 47", "UTF-8"]),
        case("G16 element", with_key("a", array(8, 1, text(b"\xff"))), &["UTF-8"]),
        case("G17", with_key("a", raw(7, [7])), &["at byte 37", "7 as a bool", "0 or 1"]),
        case("G17 element", with_key("a", array(7, 3, [0, 1, 2])), &["2 as a bool"]),
        case("G18 zero", alignment(gguf::u32(0)), &["general.alignment", "found 0", "8 to 65536"]),
        case("G18 three", alignment(gguf::u32(24)), &["found 24", "power of two"]),
        case("G18 four", alignment(gguf::u32(4)), &["found 4", "power of two"]),
        case("G18 2^31", alignment(gguf::u32(1 << 31)), &["2147483648", "65536"]),
        case("G18 int32", alignment(gguf::i32(32)), &["value type int32", "uint32"]),
        case("G18 string", alignment(string("32")), &["value type string", "uint32"]),
    ]
}

fn tensor_cases() -> Vec<Case> {
    let n_dims = |count| edited(|file| file.tensor_mut("output_norm.weight").n_dims = Some(count));
    let (f32_type, q4_0, q8_0) = (0, 2, 8);
    let most = i64::MAX as u64;
    vec![
        case("G19", n_dims(5), &["output_norm.weight", "5 dimensions", "1 to 4"]),
        case("G19", n_dims(u32::MAX), &["4294967295 dimensions", "1 to 4"]),
        case("G19 none", n_dims(0), &["0 dimensions", "1 to 4"]),
        case("G20", with_tensor(f32_type, &[4, 0]), &["token_embd.weight", "dimension of 0"]),
        case("G21", with_tensor(f32_type, &[1 << 20; 4]), &["too many elements"]),
        case("G22", with_tensor(f32_type, &[most, 2]), &["too many elements"]),
        case("G22 negative", with_tensor(f32_type, &[u64::MAX]), &["18446744073709551615"]),
        case("G23", with_tensor(f32_type, &[u64::MAX / 4]), &["too many bytes"]),
        case("G23 before padding", with_tensor(f32_type, &[most / 4]), &["bytes at data offset 0"]),
        case("G24", with_tensor(q8_0, &[(1 << 63) - 32, 1]), &["too many bytes"]),
        case("G24 rows", with_tensor(q8_0, &[32, (1 << 58) - 1]), &["too many bytes"]),
        case(
            "G25",
            with_tensor(q4_0, &[33, 2]),
            &["Q4_0 [2, 33]: a row ends inside", "whole blocks of 32"],
        ),
        case(
            "G25 K",
            with_tensor(Format::Q6K.ggml_type(), &[128, 2]),
            &["a row ends inside", "whole blocks of 256"],
        ),
        case("G26", with_tensor(99, &[32]), &["number 99", "token_embd.weight", "Q4_K"]),
        case("G26 removed", with_tensor(4, &[32]), &["Q4_2", "removed", "token_embd.weight"]),
        case("G26 known", with_tensor(21, &[256]), &["IQ3_S", "token_embd.weight", "MXFP4"]),
        case(
            "G31",
            edited(|file| {
                file.tensor_mut("output_norm.weight").name = b"token_embd.weight".to_vec()
            }),
            &["token_embd.weight", "second tensor"],
        ),
        case("G32 NUL", with_name("a\0b"), &["tensor name", "control characters"]),
        case("G32 slash", with_name("../../etc/passwd"), &["tensor name", "slashes"]),
        case("G32 empty", with_name(""), &["tensor name"]),
        case("G32 long", with_name(&"n".repeat(1 << 20)), &["1048576 bytes", "256"]),
        case("G32 one more than allowed", with_name(&"n".repeat(257)), &["257 bytes", "256"]),
    ]
}

fn data_cases() -> Vec<Case> {
    let moved = |offset| edited(|file| file.tensor_mut("output_norm.weight").offset = Some(offset));
    // Q4_K rows take 3 * 144 = 432 bytes, padded to 448.
    let swapped = edited(|file| {
        file.tensor_mut("output_norm.weight").offset = Some(480);
        file.tensor_mut("token_embd.weight").offset = Some(448);
    });
    let good = good_gguf().build();
    let twice = edited(|file| file.tensor_mut("token_embd.weight").offset = Some(448));
    vec![
        case("G27", moved(450), &["output_norm.weight", "offset 450", "alignment 32"]),
        case("G28", moved(1 << 40), &["1099511627776", "gap"]),
        case("G28 wraps", moved(u64::MAX - 31), &["18446744073709551584"]),
        case("G29", moved(0), &["output_norm.weight", "inside an earlier tensor"]),
        case("G29 same place", twice, &["token_embd.weight", "inside an earlier tensor"]),
        case("G30 gap", moved(480), &["offset 480", "gap", "allowed: 448"]),
        case("G30 order", swapped, &["output_norm.weight", "offset 480"]),
        case("G33", &good[..good.len() - 1], &["token_embd.weight", "unfinished download"]),
        case("G33 no data", good_gguf().header(), &["blk.0.attn_q.weight", "unfinished download"]),
    ]
}

/// A safetensors file of this header and data.
pub fn safetensors(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    [&(header.as_ref().len() as u64).to_le_bytes()[..], header.as_ref(), data].concat()
}

/// A small good file with every data type.
pub fn good_safetensors() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},
        "a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "c":{"dtype":"U8","shape":[5],"data_offsets":[32,37]},
        "b":{"dtype":"BF16","shape":[2,2,1],"data_offsets":[24,32]},
        "scalar":{"dtype":"F16","shape":[],"data_offsets":[37,39]}}   "#;
    safetensors(header, &[7; 39])
}

fn one(dtype: &str, shape: &str, offsets: &str, data: usize) -> Vec<u8> {
    let tensor = format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#);
    safetensors(format!(r#"{{"w":{tensor}}}"#), &vec![0; data])
}

fn two(first: &str, second: &str, data: usize) -> Vec<u8> {
    let tensor = |offsets| format!(r#"{{"dtype":"U8","shape":[4],"data_offsets":{offsets}}}"#);
    let header = format!(r#"{{"v":{},"w":{}}}"#, tensor(first), tensor(second));
    safetensors(header, &vec![0; data])
}

/// A file with `count` tensors of one byte each.
pub fn tiny_tensors(count: usize) -> Vec<u8> {
    let mut header = String::from("{");
    for index in 0..count {
        let comma = if index == 0 { "" } else { "," };
        let next = index + 1;
        header.push_str(&format!(
            r#"{comma}"{index}":{{"dtype":"U8","shape":[1],"data_offsets":[{index},{next}]}}"#
        ));
    }
    header.push('}');
    safetensors(header, &vec![0; count])
}

pub fn safetensors_cases() -> Vec<Case> {
    let length = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    let deep = |open: &str| safetensors(format!("{{\"w\":{}", open.repeat(100_000)), &[]);
    let good = good_safetensors();
    let mut trailing = good.clone();
    trailing.push(0);
    let tensor = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let dimensions = format!("[{}]", ["1"; 9].join(","));
    let name = "n".repeat(2000);
    let mut cases = vec![
        case("S01", length(3), &["header length", "found 3", "at most 2"]),
        case("S01 most", length(100_000_000), &["100000000", "at most 2", "unfinished download"]),
        case("S02", length(100_000_001), &["100000001", "100000000"]),
        case("S02 wraps", length(u64::MAX), &["18446744073709551615"]),
        case("S03", length(0), &["header length", "found 0"]),
        case("S03", length(1), &["header length", "found 1"]),
        case("S04", safetensors(b"{\"\xff\xfe\":1}", &[]), &["header", "at byte "]),
        case("S05", safetensors("[1,2]", &[]), &["at byte 8", "JSON object"]),
        case("S05 space", safetensors(" {}", &[]), &["at byte 8", "JSON object"]),
        case("S05 more", safetensors("{}{}", &[]), &["at byte ", "trailing characters"]),
        case("S06", deep("["), &["64 deep"]),
        case("S06 objects", deep(r#"{"a":"#), &["64 deep"]),
        case("S07", safetensors(format!(r#"{{"w":{tensor},"w":{tensor}}}"#), &[0]), &["tensor w"]),
        case(
            "S07 field",
            safetensors(
                r#"{"w":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
                &[0],
            ),
            &["duplicate field", "dtype"],
        ),
        case(
            "S07 metadata",
            safetensors(r#"{"__metadata__":{},"__metadata__":{}}"#, &[]),
            &["second __metadata__"],
        ),
        case("S08 reversed", one("U8", "[4]", "[4,0]", 4), &["tensor w", "[4, 0]", "begin <= end"]),
        case("S08 overlap", two("[0,4]", "[2,6]", 6), &["tensor w", "overlaps", "allowed: 4"]),
        case("S08 same place", two("[0,4]", "[0,4]", 4), &["overlaps"]),
        case("S08 gap", two("[0,4]", "[5,9]", 9), &["tensor w", "gap", "allowed: 4"]),
        case("S08 first gap", one("U8", "[4]", "[1,5]", 5), &["gap", "allowed: 0"]),
        case("S08 behind the end", one("U8", "[4]", "[0,4]", 3), &["[0, 4]", "<= 3"]),
        case("S08 nothing at the end", trailing, &["1 bytes that belong to no tensor"]),
        case("S08 negative", one("U8", "[4]", "[-4,0]", 4), &["-4", "at byte "]),
        case("S08 three", one("U8", "[4]", "[0,4,4]", 4), &["at byte "]),
        case(
            "S09",
            one("F32", "[4194305,4194305,211106198978564]", "[0,4]", 4),
            &["tensor w", "4194305", "2^63 bytes"],
        ),
        case("S09 dimension", one("U8", "[18446744073709551616]", "[0,4]", 4), &["at byte "]),
        case("S09 dimensions", one("U8", &dimensions, "[0,1]", 1), &["8 dimensions"]),
        case("S10", one("F32", "[2]", "[0,4]", 4), &["found 4 bytes", "8 bytes for F32 [2]"]),
        case("S10 larger", one("BF16", "[1]", "[0,4]", 4), &["found 4 bytes", "2 bytes"]),
        case("S11", one("Q9_X", "[4]", "[0,4]", 4), &["Q9_X of tensor w", "F32, F16, BF16, U8"]),
        case("S11 FP8", one("F8_E4M3", "[4]", "[0,4]", 4), &["F8_E4M3 of tensor w", "FP8"]),
        case("S11 number", safetensors(r#"{"w":{"dtype":1}}"#, &[]), &["at byte "]),
        case("S11 nothing", safetensors(r#"{"w":{}}"#, &[]), &["missing field"]),
        case("S12", one("F32", "[0]", "[0,0]", 0), &["tensor w", "[0]", "at least 1"]),
        case("S12 beside", one("F32", "[3,0]", "[4,4]", 4), &["tensor w", "at least 1"]),
        case("S13 too many", tiny_tensors((1 << 20) + 1), &["more than 1048576 tensors"]),
        case("name", safetensors(format!(r#"{{"{name}":{tensor}}}"#), &[0]), &["2000 bytes"]),
        case("name", safetensors(format!(r#"{{"a\u0000":{tensor}}}"#), &[0]), &["control"]),
        case("metadata", safetensors(r#"{"__metadata__":{"a":1}}"#, &[]), &["at byte "]),
    ];
    cases.extend((1..8).map(|len| case("S03 short file", &good[..len], &["at least 8 bytes"])));
    cases
}
