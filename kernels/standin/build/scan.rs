//! Finds kernels in the preprocessed text of a `.cu` file, where
//! `cuda_host.h` has turned CUDA's keywords into words of ours.

/// A kernel of a file.
pub struct Kernel {
    pub name: String,
    /// The expression of `__launch_bounds__`'s first argument.
    pub threads_limit: Option<String>,
}

const KEYWORD: &str = "pregate_kernel";
const BOUNDS: &str = "pregate_bounds(";

/// All `extern "C" __global__ void name(...)` of `text`.
pub fn kernels(text: &str) -> Vec<Kernel> {
    let mut found: Vec<Kernel> = Vec::new();
    for (at, _) in text.match_indices(KEYWORD) {
        let before = text[..at].trim_end();
        let rest = &text[at + KEYWORD.len()..];
        let Some(open) = header_end(rest) else {
            continue;
        };
        let header = &rest[..open];
        let name = header.rsplit(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("");
        assert!(
            before.ends_with("\"C\"") || header.contains("\"C\""),
            "kernel {name} is not extern \"C\""
        );
        // A declaration ahead of its definition names the same kernel.
        if !name.is_empty() && found.iter().all(|kernel| kernel.name != name) {
            found.push(Kernel { name: name.to_string(), threads_limit: bounds(header) });
        }
    }
    found
}

/// Where the parameter list of the function begins, behind the parentheses of
/// its bounds.
fn header_end(text: &str) -> Option<usize> {
    let mut from = 0;
    if let Some(at) = text.find(BOUNDS)
        && text.find(['{', ';']).is_none_or(|end| at < end)
    {
        from = at + BOUNDS.len() + closing(&text[at + BOUNDS.len()..])? + 1;
    }
    let open = from + text[from..].find('(')?;
    Some(open - (text[..open].len() - text[..open].trim_end().len()))
}

fn closing(text: &str) -> Option<usize> {
    let mut depth = 1;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

fn bounds(header: &str) -> Option<String> {
    let inside = &header[header.find(BOUNDS)? + BOUNDS.len()..];
    let inside = &inside[..closing(inside)?];
    let mut depth = 0;
    let end = inside.char_indices().find(|(_, c)| {
        match c {
            '(' | '<' => depth += 1,
            ')' | '>' => depth -= 1,
            _ => {}
        }
        depth == 0 && *c == ','
    });
    Some(inside[..end.map_or(inside.len(), |(at, _)| at)].trim().to_string())
}
