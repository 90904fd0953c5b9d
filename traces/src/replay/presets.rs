//! Machines that are known by name, and machines in files.
//!
//! `presets/*.toml` are data: each figure says who measured it, how it was
//! computed, or that it is assumed. Hosts are those that usually go with a
//! card.

use super::{Machine, MachineError};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// Names with their files, ordered by name.
const PRESETS: [(&str, &str); 13] = [
    ("cpu-ddr4", include_str!("presets/cpu-ddr4.toml")),
    ("cpu-ddr5", include_str!("presets/cpu-ddr5.toml")),
    ("laptop-8gb", include_str!("presets/laptop-8gb.toml")),
    ("rtx3060-12gb", include_str!("presets/rtx3060-12gb.toml")),
    ("rtx3090", include_str!("presets/rtx3090.toml")),
    ("rtx4060ti-16gb", include_str!("presets/rtx4060ti-16gb.toml")),
    ("rtx4070", include_str!("presets/rtx4070.toml")),
    ("rtx4070ti-super", include_str!("presets/rtx4070ti-super.toml")),
    ("rtx4080", include_str!("presets/rtx4080.toml")),
    ("rtx4090", include_str!("presets/rtx4090.toml")),
    ("rtx5070ti", include_str!("presets/rtx5070ti.toml")),
    ("rtx5080", include_str!("presets/rtx5080.toml")),
    ("rtx5090", include_str!("presets/rtx5090.toml")),
];

/// A machine is a page of text; what is longer is something else.
const MOST_BYTES: u64 = 64 << 10;

/// The machines that have a name.
pub fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

/// The machine with this name.
pub fn preset(name: &str) -> Option<Machine> {
    let (_, text) = PRESETS.iter().find(|(known, _)| *known == name)?;
    Some(Machine::from_toml(text).expect("the tests read every preset"))
}

/// The machine in a file, in the format of the presets.
///
/// # Errors
/// A file that cannot be read; otherwise the line, the field, what was found
/// and what is allowed.
pub fn read(path: &Path) -> Result<Machine, MachineError> {
    let io = |source| MachineError::Io { path: path.to_path_buf(), source };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io)?;
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    let at = |line: usize, what: String| {
        Err(MachineError::File { path: path.to_path_buf(), line, what })
    };
    if bytes.len() as u64 > MOST_BYTES {
        return at(1, format!("a machine has at most {MOST_BYTES} bytes; this is something else"));
    }
    let text = match std::str::from_utf8(&bytes) {
        Ok(text) => text,
        Err(error) => {
            let before = &bytes[..error.valid_up_to()];
            return at(line(before), "found bytes that are not UTF-8".to_string());
        }
    };
    match Machine::from_toml(text) {
        Ok(machine) => Ok(machine),
        Err(MachineError::Toml(error)) => {
            let start = error.span().map_or(0, |span| span.start).min(text.len());
            at(line(&text.as_bytes()[..start]), words(&error, text, start))
        }
        Err(MachineError::Figure { field, found, allowed, .. }) => {
            let start = place(text, field).unwrap_or(0);
            let what = format!("{field} is {found}; it has to be {allowed}");
            at(line(&text.as_bytes()[..start]), what)
        }
        Err(MachineError::NoLink(_)) => {
            let start = place(text, "gpu").unwrap_or(0);
            at(line(&text.as_bytes()[..start]), "a machine with [gpu] needs [link]".to_string())
        }
        Err(other) => Err(other),
    }
}

/// Counted from 1.
fn line(before: &[u8]) -> usize {
    1 + before.iter().filter(|&&byte| byte == b'\n').count()
}

/// The reader's words in one line, with the field that begins the line where
/// they name none.
fn words(error: &toml::de::Error, text: &str, start: usize) -> String {
    let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
    let begin = text[..start].rfind('\n').map_or(0, |at| at + 1);
    let key = text[begin..].split(['=', '\n']).next().unwrap_or_default().trim();
    let is_name = |c: char| c.is_ascii_alphanumeric() || "._".contains(c);
    let field = match !key.is_empty() && key.len() <= 64 && key.chars().all(is_name) {
        true => format!("{key}: "),
        false => String::new(),
    };
    match message.contains("untagged") {
        true => {
            format!("{field}a number is allowed, or {{ value = 24.0, source = \"who says so\" }}")
        }
        false => format!("{field}{message}"),
    }
}

/// Where the value of a dotted field begins.
fn place(text: &str, field: &str) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut start = 0;
    for key in field.split('.') {
        let (_, value) = table.iter().find(|(name, _)| name.get_ref() == key)?;
        start = value.span().start;
        match value.get_ref() {
            DeValue::Table(next) => table = next,
            _ => break,
        }
    }
    Some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_of_every_preset_says_where_it_comes_from() {
        for (name, text) in PRESETS {
            let machine = preset(name).unwrap();
            assert_eq!(machine.name, name);
            assert_eq!(machine.gpu.is_none(), name.starts_with("cpu-"), "{name}");
            // Numbers stand nowhere but beside a source.
            let figures = text.matches("value = ").count();
            assert_eq!(figures, if machine.gpu.is_some() { 17 } else { 10 }, "{name}");
            for line in text.lines().filter(|line| line.contains("value = ")) {
                let source = line.split("source = \"").nth(1).unwrap_or_default();
                assert!(source.len() > 10, "{name}: {line}");
            }
            assert!(text.lines().all(|line| line.contains("value = ") == line.contains(" = {")));
        }
        assert!(names().is_sorted());
        assert_eq!(preset("rtx1"), None);
    }

    /// What is known without any document: a rate beside another is never
    /// above the rate alone, and memory feeds both.
    #[test]
    fn presets_are_machines_that_can_be() {
        for name in names() {
            let Machine { gpu, link, cpu, disk, ram_bytes, .. } = preset(name).unwrap();
            assert!(cpu.expert_gbs_beside.value <= cpu.expert_gbs.value, "{name}");
            assert!(disk.gbs.value < cpu.expert_gbs.value, "{name}");
            assert!((16e9..256e9).contains(&ram_bytes.value), "{name}");
            let (Some(gpu), Some(link)) = (gpu, link) else { continue };
            assert!(link.gbs_beside_cpu.value <= link.gbs.value, "{name}");
            assert!(link.gbs_beside_cpu.value + cpu.expert_gbs_beside.value <= 70.1, "{name}");
            assert!(gpu.vram_gbs.value > cpu.expert_gbs.value, "{name}");
            assert!((6e9..33e9).contains(&gpu.vram_bytes.value), "{name}");
        }
        let peak = |name: &str| preset(name).unwrap().gpu.unwrap().vram_gbs.value / 0.87;
        // limits.md section 2.
        for (name, gb_s) in [
            ("rtx3060-12gb", 360.0),
            ("rtx3090", 936.0),
            ("rtx4070", 504.0),
            ("rtx4090", 1008.0),
            ("rtx5090", 1792.0),
        ] {
            assert!((peak(name) - gb_s).abs() < 1.0, "{name}: {}", peak(name));
        }
    }

    #[test]
    fn a_bad_file_is_told_by_line_and_field() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.toml");
        let good = PRESETS.iter().find(|(name, _)| *name == "rtx4090").unwrap().1;
        let refused = |text: &[u8]| {
            std::fs::write(&path, text).unwrap();
            let words = read(&path).unwrap_err().to_string();
            assert_eq!(words.lines().count(), 1, "{words}");
            words.strip_prefix(&path.display().to_string()).unwrap().to_string()
        };
        std::fs::write(&path, good).unwrap();
        assert_eq!(Some(read(&path).unwrap()), preset("rtx4090"));
        for (from, to, wanted) in [
            (
                "vram_gbs = { value = 877.0",
                "vram_gbs = { value = -1",
                ": line 9: gpu.vram_gbs is -1",
            ),
            (
                "vram_gbs = { value = 877.0",
                "vram_gbs = { value = nan",
                ": line 9: gpu.vram_gbs is NaN",
            ),
            (
                "vram_gbs = { value = 877.0",
                "vram_gbs = { value = \"fast\"",
                ": line 9: vram_gbs: a number",
            ),
            ("vram_gbs = {", "speed = {", ": line 9: speed: unknown field `speed`"),
            ("[link]", "[rope]", "unknown field `rope`"),
            ("[disk]", "[disk", "line 27: unclosed table"),
            ("name = \"rtx4090\"", "", "missing field `name`"),
        ] {
            let words = refused(good.replacen(from, to, 1).as_bytes());
            assert!(words.contains(wanted), "{words}, not {wanted}");
        }
        let (head, rest) = good.split_once("[link]").unwrap();
        let without = format!("{head}[cpu]{}", rest.split_once("[cpu]").unwrap().1);
        assert!(
            refused(without.as_bytes()).contains(": line 7: a machine with [gpu] needs [link]")
        );
        assert!(refused(b"name = \"a\"\n\xff\xfe").contains("line 2: found bytes"));
        assert!(refused(&vec![b'#'; 100_000]).contains("at most"));
        // Deep nesting ends, too.
        let deep = format!("name = {}1{}", "[".repeat(20_000), "]".repeat(20_000));
        assert!(refused(deep.as_bytes()).contains("line 1"));
        assert!(read(Path::new("/nowhere/m.toml")).unwrap_err().to_string().contains("/nowhere"));
    }
}
