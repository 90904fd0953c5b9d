//! Just enough of XML 1.0 to say that a file is well-formed: one root, tags
//! that match, attributes quoted and unique, known entities, legal characters.

/// # Errors
/// What is wrong, with some of the text around it.
pub fn check(text: &str) -> Result<(), String> {
    let illegal = |c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r');
    if let Some(found) = text.chars().find(|&c| illegal(c) || matches!(c, '\u{fffe}' | '\u{ffff}'))
    {
        return Err(format!("the character {found:?}"));
    }
    let (mut open, mut roots, mut rest): (Vec<&str>, usize, &str) = (Vec::new(), 0, text);
    while !rest.is_empty() {
        let Some(content) = rest.strip_prefix('<') else {
            let end = rest.find('<').unwrap_or(rest.len());
            characters(&rest[..end])?;
            if open.is_empty() && !rest[..end].trim().is_empty() {
                return Err(format!("text outside of the root: {}", &rest[..end]));
            }
            rest = &rest[end..];
            continue;
        };
        let end = content.find('>').ok_or("a tag that does not end")?;
        let (tag, behind) = (&content[..end], &content[end + 1..]);
        rest = behind;
        if let Some(name) = tag.strip_prefix('/') {
            match open.pop() {
                Some(expected) if expected == name.trim() => {}
                other => return Err(format!("</{name}> closes {other:?}")),
            }
            continue;
        }
        let (tag, closes) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let name = element(tag)?;
        if open.is_empty() {
            roots += 1;
        }
        if !closes {
            open.push(name);
        }
    }
    match (open.last(), roots) {
        (None, 1) => Ok(()),
        (Some(name), _) => Err(format!("<{name}> is never closed")),
        (None, _) => Err(format!("{roots} roots")),
    }
}

/// The name of a tag whose attributes are as they should be.
fn element(tag: &str) -> Result<&str, String> {
    let end = tag.find(char::is_whitespace).unwrap_or(tag.len());
    let (name, mut rest) = (&tag[..end], tag[end..].trim_start());
    is_name(name)?;
    let mut seen = Vec::new();
    while !rest.is_empty() {
        let (key, value) = rest.split_once("=\"").ok_or_else(|| format!("attribute in <{tag}>"))?;
        is_name(key)?;
        if seen.contains(&key) {
            return Err(format!("{key} twice in <{tag}>"));
        }
        seen.push(key);
        let (value, behind) = value.split_once('"').ok_or_else(|| format!("quote in <{tag}>"))?;
        characters(value)?;
        if !behind.is_empty() && !behind.starts_with(char::is_whitespace) {
            return Err(format!("no space behind {key} in <{tag}>"));
        }
        rest = behind.trim_start();
    }
    Ok(name)
}

fn is_name(text: &str) -> Result<(), String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_:.".contains(c);
    let starts = text.starts_with(|c: char| c.is_ascii_alphabetic());
    if starts && text.chars().all(legal) { Ok(()) } else { Err(format!("the name {text:?}")) }
}

/// Text or a value: no markup, and entities that every reader knows.
fn characters(text: &str) -> Result<(), String> {
    if text.contains('<') || text.contains("]]>") {
        return Err(format!("markup in {text:?}"));
    }
    for piece in text.split('&').skip(1) {
        let entity = piece.split_once(';').map(|(entity, _)| entity);
        if !matches!(entity, Some("amp" | "lt" | "gt" | "quot" | "apos" | "#39")) {
            return Err(format!("an entity in {text:?}"));
        }
    }
    Ok(())
}

#[test]
fn what_is_not_well_formed_is_found() {
    assert_eq!(check("<a b=\"1\"><c/>x &amp; y</a>\n"), Ok(()));
    for bad in [
        "<a>",
        "<a></b>",
        "<a/><b/>",
        "",
        "x<a/>",
        "<a b=1/>",
        "<a b=\"1\" b=\"2\"/>",
        "<a>&no;</a>",
        "<a>a & b</a>",
        "<a>\u{1b}</a>",
        "<1/>",
        "<a b=\"1\"c=\"2\"/>",
        "<a",
        "<a>]]></a>",
    ] {
        assert!(check(bad).is_err(), "{bad:?}");
    }
}
