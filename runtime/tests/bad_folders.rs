//! Models in several files and folders: what belongs together opens from any
//! end, what does not is refused with a message that says what is wrong.
//! Cases G35, S14, C01 and X03.

#[path = "support/badfiles.rs"]
mod badfiles;
#[path = "support/gguf_builder.rs"]
mod gguf_builder;
#[path = "support/scratch.rs"]
mod scratch;

use gguf_builder::{Gguf, raw, string};
use pregate_runtime::files::{Container, ModelFiles};
use scratch::Scratch;
use std::path::Path;

fn refused(path: &Path, mentions: &[&str]) {
    let message = match ModelFiles::open(path) {
        Ok(opened) => panic!("accepted: {opened:?}"),
        Err(error) => error.to_string(),
    };
    for part in mentions {
        assert!(message.contains(part), "{part:?} is missing in: {message}");
    }
}

/// Shard `number` (from zero) of three, with two tensors.
fn shard(number: u16) -> Gguf {
    let file = Gguf::new()
        .key("split.no", raw(2, number.to_le_bytes()))
        .key("split.count", raw(2, 3_u16.to_le_bytes()))
        .key("split.tensors.count", gguf_builder::i32(6));
    let file = match number {
        0 => file
            .key("general.architecture", string("qwen3moe"))
            .key("general.name", string("Split")),
        _ => file,
    };
    let value = f32::from(number);
    file.f32_tensor(&format!("blk.{number}.a.weight"), &[3], &[value; 3]).f32_tensor(
        &format!("blk.{number}.b.weight"),
        &[8],
        &[value; 8],
    )
}

fn name(number: usize) -> String {
    format!("Model-Q8_0-{number:05}-of-00003.gguf")
}

fn write_shards(scratch: &Scratch) {
    for number in 0..3 {
        scratch.write(&name(usize::from(number) + 1), &shard(number).build());
    }
}

#[test]
fn any_shard_opens_the_whole_model() {
    let scratch = Scratch::new("split");
    write_shards(&scratch);
    let mut fingerprints = Vec::new();
    let ends = (1..=3).map(|number| scratch.path().join(name(number)));
    for path in ends.chain([scratch.path().to_path_buf()]) {
        let opened = ModelFiles::open(&path).unwrap();
        assert_eq!(opened.paths().len(), 3);
        assert_eq!(opened.tensors().len(), 6);
        for number in 0..3_u16 {
            let tensor = opened.tensor(&format!("blk.{number}.b.weight")).unwrap();
            assert_eq!(tensor.file, usize::from(number));
            assert_eq!(opened.bytes(tensor), f32::from(number).to_le_bytes().repeat(8));
        }
        let Container::Gguf(keys) = opened.container() else { panic!("not GGUF") };
        assert_eq!(keys.string("general.name").unwrap(), Some("Split"));
        let size = |path| std::fs::metadata(path).unwrap().len();
        assert_eq!(opened.total_bytes(), opened.paths().iter().map(size).sum::<u64>());
        fingerprints.push(opened.fingerprint());
    }
    assert!(fingerprints.iter().all(|&print| print == fingerprints[0]));
}

#[test]
fn the_first_shard_may_hold_keys_only() {
    let scratch = Scratch::new("split_no_tensors");
    for number in 0..3 {
        let mut file = shard(number).replace("split.tensors.count", gguf_builder::i32(4));
        if number == 0 {
            file.tensors.clear();
        }
        scratch.write(&name(usize::from(number) + 1), &file.build());
    }
    assert_eq!(ModelFiles::open(&scratch.path().join(name(2))).unwrap().tensors().len(), 4);
}

/// G35.
#[test]
fn shards_that_do_not_belong_together_are_refused() {
    let with = |what: &str, number: usize, bytes: &[u8], mentions: &[&str]| {
        let scratch = Scratch::new(&format!("split_{what}"));
        write_shards(&scratch);
        let changed = scratch.write(&name(number), bytes);
        for opened in 1..=3 {
            refused(&scratch.path().join(name(opened)), mentions);
        }
        drop(changed);
    };
    let key = |number, key: &str, value| shard(number).key(key, value).build();

    let other_count = shard(1).replace("split.count", raw(2, 4_u16.to_le_bytes())).build();
    let scratch = Scratch::new("split_count");
    write_shards(&scratch);
    let second = scratch.write(&name(2), &other_count);
    refused(&scratch.path().join(name(1)), &[&name(2), "split.count: found 4; allowed: 3"]);
    refused(&second, &[&name(2), "NAME-00001-of-00004.gguf"]);

    with("twice", 2, &shard(2).build(), &[&name(2), "split.no: found 2; allowed: 1"]);
    let lost = shard(1).remove("split.no").build();
    with("no_number", 2, &lost, &[&name(2), "split.no: found nothing"]);
    let foreign = key(1, "general.architecture", string("olmoe"));
    with("foreign", 2, &foreign, &[&name(2), "general.architecture", "shards of one model"]);
    let foreign = key(2, "general.uuid", string("1234"));
    with("uuid", 3, &foreign, &[&name(3), "general.uuid", "shards of one model"]);
    let mut repeated = shard(2);
    repeated.tensor_mut("blk.2.a.weight").name = b"blk.0.a.weight".to_vec();
    with("repeated", 3, &repeated.build(), &[&name(3), "blk.0.a.weight", "second tensor"]);
    let mut less = shard(2);
    less.tensors.pop();
    with("less", 3, &less.build(), &[&name(1), "split.tensors.count", "found 6; allowed: 5"]);
    with("truncated", 2, &shard(1).build()[..200], &[&name(2)]);
}

/// G35: files that are not there, or not what their names say.
#[test]
fn missing_and_renamed_shards_are_refused() {
    let scratch = Scratch::new("split_missing");
    write_shards(&scratch);
    let lone = scratch.write("renamed.gguf", &shard(0).build());
    refused(&lone, &["renamed.gguf", "one of 3 shards"]);
    std::fs::remove_file(scratch.path().join(name(2))).unwrap();
    refused(&scratch.path().join(name(1)), &[&name(2), "no such file", "all 3 shards"]);
    refused(&scratch.path().join(name(3)), &[&name(2), "no such file"]);
    let many = shard(0).replace("split.count", raw(2, 5000_u16.to_le_bytes())).build();
    refused(&scratch.write(&name(1), &many), &["split.count", "5000", "at most 4096"]);

    #[cfg(unix)]
    {
        // A shard that leads to itself, and one that is another shard.
        let second = scratch.path().join(name(2));
        std::os::unix::fs::symlink(&second, &second).unwrap();
        refused(&scratch.path().join(name(3)), &[&name(2)]);
        std::fs::remove_file(&second).unwrap();
        std::os::unix::fs::symlink(scratch.path().join(name(3)), &second).unwrap();
        scratch.write(&name(1), &shard(0).build());
        refused(&scratch.path().join(name(1)), &[&name(2), "split.no: found 2; allowed: 1"]);
    }
}

/// Two shards of a Hugging Face folder and their index.
fn write_folder(scratch: &Scratch) {
    scratch.write("config.json", br#"{"model_type":"qwen3_moe"}"#);
    let shard = |name: &str| {
        let tensor = r#"{"dtype":"U8","shape":[2],"data_offsets":[0,2]}"#;
        badfiles::safetensors(format!(r#"{{"{name}":{tensor}}}"#), b"ab")
    };
    scratch.write("model-00001-of-00002.safetensors", &shard("v"));
    scratch.write("model-00002-of-00002.safetensors", &shard("w"));
    write_index(scratch, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
}

fn write_index(scratch: &Scratch, v: &str, w: &str) {
    let index = serde_json::json!({"metadata": {"total_size": 4}, "weight_map": {"v": v, "w": w}});
    scratch.write("model.safetensors.index.json", index.to_string().as_bytes());
}

#[test]
fn a_folder_with_an_index_opens() {
    let scratch = Scratch::new("folder");
    write_folder(&scratch);
    let opened = ModelFiles::open(scratch.path()).unwrap();
    assert_eq!(opened.paths().len(), 2);
    assert_eq!(opened.tensor("w").unwrap().file, 1);
    assert_eq!(opened.bytes(opened.tensor("w").unwrap()), b"ab");
    let Container::HuggingFace { config, .. } = opened.container() else { panic!("not a folder") };
    assert_eq!(config["model_type"], "qwen3_moe");
    let before = opened.fingerprint();
    scratch.write("config.json", br#"{"model_type":"olmoe"}"#);
    assert_ne!(ModelFiles::open(scratch.path()).unwrap().fingerprint(), before);
}

/// S14.
#[test]
fn an_index_stays_in_its_folder() {
    let first = "model-00001-of-00002.safetensors";
    let passwd = "../../../../../../../etc/passwd";
    for bad in
        [passwd, "/etc/passwd", "../x.safetensors", "a/b.safetensors", "", "..", ".safetensors"]
    {
        let scratch = Scratch::new("index_out");
        write_folder(&scratch);
        write_index(&scratch, first, bad);
        refused(
            scratch.path(),
            &["model.safetensors.index.json", "weight_map entry w", "plain name"],
        );
    }
    let scratch = Scratch::new("index");
    write_folder(&scratch);
    write_index(&scratch, first, "model-00003-of-00002.safetensors");
    refused(scratch.path(), &["model-00003-of-00002.safetensors", "No such file"]);
    write_index(&scratch, first, first);
    refused(scratch.path(), &["weight_map entry w", "no such tensor in any shard"]);
    write_index(&scratch, "model-00002-of-00002.safetensors", first);
    refused(scratch.path(), &["weight_map entry v", "allowed: the tensor in model-00002-of"]);
    // The tensor v twice.
    let shard = std::fs::read(scratch.path().join(first)).unwrap();
    scratch.write("model-00002-of-00002.safetensors", &shard);
    refused(scratch.path(), &["model-00002-of-00002.safetensors", "tensor v", "a second tensor"]);
    let many: serde_json::Map<_, _> =
        (0..4097).map(|i| (format!("t{i}"), format!("{i}.safetensors").into())).collect();
    let many = serde_json::json!({ "weight_map": many }).to_string();
    scratch.write("model.safetensors.index.json", many.as_bytes());
    refused(scratch.path(), &["weight_map", "4097 files", "1 to 4096"]);
    scratch.write("model.safetensors.index.json", br#"{"weight_map":{}}"#);
    refused(scratch.path(), &["weight_map", "0 files"]);
    scratch.write("model.safetensors.index.json", br#"{"weight_map":{"a":1}}"#);
    refused(scratch.path(), &["index.json at byte 19", "allowed: "]);
    scratch.write("model.safetensors.index.json", br#"{"metadata":{}}"#);
    refused(scratch.path(), &["index.json", "missing field `weight_map`"]);
}

/// S14: links as in Hugging Face's cache open; links to anything but files
/// do not.
#[cfg(unix)]
#[test]
fn links_open_where_they_lead_to_files() {
    use std::os::unix::fs::symlink;
    let scratch = Scratch::new("links");
    write_folder(&scratch);
    let snapshot = scratch.path().join("snapshots/abc");
    std::fs::create_dir_all(&snapshot).unwrap();
    for entry in std::fs::read_dir(scratch.path()).unwrap() {
        let name = entry.unwrap().file_name();
        if scratch.path().join(&name).is_file() {
            symlink(Path::new("../..").join(&name), snapshot.join(&name)).unwrap();
        }
    }
    assert_eq!(ModelFiles::open(&snapshot).unwrap().tensors().len(), 2);
    for target in ["/dev/zero", "/etc", "/nowhere"] {
        let second = snapshot.join("model-00002-of-00002.safetensors");
        std::fs::remove_file(&second).unwrap();
        symlink(target, &second).unwrap();
        refused(&snapshot, &["model-00002-of-00002.safetensors"]);
    }
}

/// C01.
#[test]
fn configs_that_are_no_configs_are_refused() {
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(2 << 20));
    let deep = format!("{{\"a\":{}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
    for (config, part) in [
        ("", "EOF"),
        ("null", "null"),
        ("[]", "sequence"),
        ("{\"a\":1", "EOF"),
        ("{} {}", "trailing"),
        ("{\"a\":1e999}", "out of range"),
        (large.as_str(), "at most 1048576 bytes"),
        (deep.as_str(), "64 deep"),
    ] {
        let scratch = Scratch::new("config");
        write_folder(&scratch);
        scratch.write("config.json", config.as_bytes());
        refused(scratch.path(), &["config.json", part, "allowed: "]);
    }
    let scratch = Scratch::new("config_missing");
    write_folder(&scratch);
    std::fs::remove_file(scratch.path().join("config.json")).unwrap();
    refused(scratch.path(), &["safetensors files without config.json"]);
    std::fs::create_dir(scratch.path().join("config.json")).unwrap();
    refused(scratch.path(), &["config.json", "a directory"]);
}

#[test]
fn a_folder_must_hold_one_model() {
    let scratch = Scratch::new("one_model");
    refused(scratch.path(), &["no model", "config.json with *.safetensors", "*.gguf"]);
    scratch.write("config.json", b"{}");
    refused(scratch.path(), &["no model"]);
    scratch.write("a.gguf", &badfiles::good_gguf().build());
    assert_eq!(ModelFiles::open(scratch.path()).unwrap().tensors().len(), 3);
    scratch.write("b.gguf", &badfiles::good_gguf().build());
    refused(scratch.path(), &["2 GGUF models: a.gguf, b.gguf", "name the file"]);
    scratch.write("x.safetensors", &badfiles::good_safetensors());
    assert_eq!(ModelFiles::open(scratch.path()).unwrap().tensors().len(), 4);
    scratch.write("y.safetensors", &badfiles::good_safetensors());
    refused(scratch.path(), &["2 safetensors files and no index", "model.safetensors.index.json"]);
    let single = scratch.write("model.safetensors", &badfiles::good_safetensors());
    assert_eq!(ModelFiles::open(scratch.path()).unwrap().paths(), [single.as_path()]);
    refused(&single, &["model.safetensors", "its folder"]);
}

/// X03.
#[cfg(unix)]
#[test]
fn only_regular_files_are_opened() {
    let scratch = Scratch::new("not_files");
    refused(Path::new("/dev/zero"), &["/dev/zero", "a pipe, socket or device", "a regular file"]);
    refused(Path::new("/dev/null"), &["a pipe, socket or device"]);
    refused(&scratch.path().join("nothing.gguf"), &["nothing.gguf", "No such file"]);
    refused(Path::new(""), &["No such file"]);
    let folder = scratch.path().join("folder.gguf");
    std::fs::create_dir(&folder).unwrap();
    refused(&folder, &["folder.gguf", "no model"]);
    // Opening a pipe for reading would wait for a writer for ever.
    let pipe = scratch.path().join("pipe.gguf");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    refused(&pipe, &["pipe.gguf", "a pipe, socket or device"]);
    let socket = scratch.path().join("s.gguf");
    match std::os::unix::net::UnixListener::bind(&socket) {
        Ok(_listener) => refused(&socket, &["s.gguf", "a pipe, socket or device"]),
        // The folder's path is longer than a socket's may be.
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput),
    }
    refused(&scratch.write("empty.gguf", b""), &["empty.gguf", "0 bytes"]);
}

#[test]
fn changed_files_are_noticed() {
    let scratch = Scratch::new("changed");
    let bytes = badfiles::good_gguf().build();
    let path = scratch.write("model.gguf", &bytes);
    let opened = ModelFiles::open(&path).unwrap();
    assert_eq!(opened.identities()[0].len, bytes.len() as u64);
    opened.unchanged().unwrap();
    // A new file in the place of the old one; ours stays mapped.
    std::fs::rename(scratch.write("new.gguf", &bytes), &path).unwrap();
    let message = opened.unchanged().unwrap_err().to_string();
    assert!(message.contains("model.gguf") && message.contains("another file"), "{message}");
    let norm = opened.tensor("output_norm.weight").unwrap();
    assert_eq!(opened.bytes(norm), 1.0_f32.to_le_bytes().repeat(5));

    let opened = ModelFiles::open(&path).unwrap();
    scratch.write("model.gguf", &[&bytes[..], b"more"].concat());
    let message = opened.unchanged().unwrap_err().to_string();
    assert!(message.contains("bytes instead of"), "{message}");
    std::fs::remove_file(&path).unwrap();
    assert!(opened.unchanged().unwrap_err().to_string().contains("No such file"));
}

#[test]
fn bytes_of_a_foreign_tensor_are_empty() {
    let scratch = Scratch::new("foreign");
    let opened =
        ModelFiles::open(&scratch.write("a.gguf", &badfiles::good_gguf().build())).unwrap();
    let mut tensor = opened.tensors()[0].clone();
    for (file, offset, bytes) in [(1, 0, 4), (0, u64::MAX, 4), (0, 64, usize::MAX), (0, 1 << 40, 0)]
    {
        (tensor.file, tensor.offset, tensor.bytes) = (file, offset, bytes);
        assert_eq!(opened.bytes(&tensor), b"");
    }
}

#[test]
fn model_files_may_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<ModelFiles>();
}
