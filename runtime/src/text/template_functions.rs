//! What Hugging Face's template environment offers, on minijinja.

use super::{
    moment::Moment,
    python::{self, Json},
    template_rewrite as rewrite,
};
use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value, filters,
    syntax::SyntaxConfig,
    value::{Enumerator, Kwargs, Object, ObjectRepr, Rest, ValueKind, ValueOrKwargs, from_args},
};
use std::{
    borrow::Cow,
    fmt::Write,
    sync::{Arc, Mutex, PoisonError},
};

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// jinja2's `ImmutableSandboxedEnvironment(trim_blocks=True,
/// lstrip_blocks=True)` with the additions of `apply_chat_template`.
pub fn environment<'s>(now: Option<Moment>, fuel: u64) -> Result<Environment<'s>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_debug(false);
    environment.set_fuel(Some(fuel));
    environment.set_recursion_limit(200);
    environment.set_formatter(|out, _, value| {
        if let Some(text) = value.as_str() {
            return out.write_str(text).map_err(Error::from);
        }
        out.write_str(&python::text(value)?).map_err(Error::from)
    });
    environment.set_unknown_method_callback(method);

    environment.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
        Err(invalid(python::text(&message)?))
    });
    environment.add_function("strftime_now", move |pattern: &str| -> Result<String, Error> {
        let now = now.ok_or_else(|| invalid("strftime_now: the caller gave no date"))?;
        now.format(pattern)
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: &Value| python::text(value));
    environment.add_filter("join", join);
    environment.add_filter("trim", trim);
    environment.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined => true,
        // A slice is a list.
        ValueKind::Iterable => !is_generator(value),
        _ => false,
    });
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && (value.kind() == ValueKind::String || value.try_iter().is_ok())
    });
    // What `template_rewrite` inserts.
    environment.add_filter(rewrite::TEXT, |value: &Value| match value.kind() {
        ValueKind::String => Ok(value.clone()),
        _ => python::text(value).map(Value::from),
    });
    environment.add_filter(rewrite::ITERATED, |value: &Value| match value.kind() {
        ValueKind::None => Err(invalid("None is not iterable")),
        _ => Ok(value.clone()),
    });
    environment.add_filter(rewrite::MARKUP, |_: &Value| -> Result<Value, Error> {
        Err(invalid("\"|safe +\" would escape HTML in what it is added to"))
    });
    // Generators in Python: they have no length and are not JSON.
    environment.add_filter(
        "select",
        |state: &mut State, items: Value, test: Option<Cow<'_, str>>, args: Arguments| {
            filters::select(state, items, test, args).map(generator)
        },
    );
    environment.add_filter(
        "reject",
        |state: &mut State, items: Value, test: Option<Cow<'_, str>>, args: Arguments| {
            filters::reject(state, items, test, args).map(generator)
        },
    );
    environment.add_filter("selectattr", selectattr);
    environment.add_filter("rejectattr", rejectattr);
    environment.add_filter("map", |state: &mut State, items: Value, args: Arguments| {
        filters::map(state, items, args).map(generator)
    });
    environment.add_test("integer", |value: &Value| {
        value.kind() == ValueKind::Number && value.is_integer()
    });
    Ok(environment)
}

type Arguments = Rest<ValueOrKwargs>;

/// Whether Python would have a generator here.
pub fn is_generator(value: &Value) -> bool {
    value.downcast_object_ref::<Generator>().is_some()
}

fn generator(items: Vec<Value>) -> Value {
    Value::from_object(Generator(Mutex::new(items.into_iter())))
}

fn selectattr(
    state: &mut State,
    items: Value,
    attribute: Cow<'_, str>,
    test: Option<Cow<'_, str>>,
    args: Arguments,
) -> Result<Value, Error> {
    filters::selectattr(state, items, attribute, test, args).map(generator)
}

fn rejectattr(
    state: &mut State,
    items: Value,
    attribute: Cow<'_, str>,
    test: Option<Cow<'_, str>>,
    args: Arguments,
) -> Result<Value, Error> {
    filters::rejectattr(state, items, attribute, test, args).map(generator)
}

/// A Python generator: it runs once, has no length, is always true, and is
/// neither a sequence nor JSON.
#[derive(Debug)]
pub struct Generator(Mutex<std::vec::IntoIter<Value>>);

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let items = self.clone();
        Enumerator::Iter(Box::new(std::iter::from_fn(move || {
            items.0.lock().unwrap_or_else(PoisonError::into_inner).next()
        })))
    }
}

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`
fn tojson(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let option = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        let named: Option<Value> = options.get(name)?;
        let given = named.or_else(|| positional.get(at).cloned());
        Ok(given.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let indent = match option(1, "indent")? {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_string),
        Some(width) => {
            let width = i64::try_from(width)?;
            Some(" ".repeat(usize::try_from(width).unwrap_or(0).min(64)))
        }
    };
    let separators: Vec<Value> = match option(2, "separators")? {
        Some(pair) => pair.try_iter()?.collect(),
        None => Vec::new(),
    };
    let separator = |at: usize, default: &str| match separators.get(at) {
        Some(text) => python::text(text),
        None => Ok(default.to_string()),
    };
    let json = Json {
        ensure_ascii: option(0, "ensure_ascii")?.is_some_and(|flag| flag.is_true()),
        item_separator: separator(0, if indent.is_some() { "," } else { ", " })?,
        key_separator: separator(1, ": ")?,
        sort_keys: option(3, "sort_keys")?.is_some_and(|flag| flag.is_true()),
        indent,
    };
    options.assert_all_used()?;
    json.write(value).map(Value::from)
}

fn join(
    value: &Value,
    separator: Option<Value>,
    attribute: Option<Value>,
    options: Kwargs,
) -> Result<String, Error> {
    let separator = match separator.or(options.get("d")?) {
        Some(separator) => python::text(&separator)?,
        None => String::new(),
    };
    let attribute: Option<Value> = attribute.or(options.get("attribute")?);
    options.assert_all_used()?;
    let mut out = String::new();
    if value.is_undefined() {
        return Ok(out);
    }
    if value.is_none() {
        return Err(invalid("None is not iterable"));
    }
    for (count, item) in value.try_iter()?.enumerate() {
        if count > 0 {
            out.push_str(&separator);
        }
        match &attribute {
            Some(name) => out.push_str(&python::text(&item.get_item(name)?)?),
            None => out.push_str(&python::text(&item)?),
        }
    }
    Ok(out)
}

/// `str.strip`: without an argument, white space as Python knows it.
fn trim(value: &Value, chars: Option<&str>) -> Result<String, Error> {
    let text = python::text(value)?;
    Ok(match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_string(),
        None => text.trim_matches(is_space).to_string(),
    })
}

/// `str.isspace`: Unicode white space and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Methods of Python's `str`, `dict` and `list`: ours where they differ from
/// or are missing in `minijinja-contrib`.
fn method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if method == rewrite::REVERSED {
        return reversed(value);
    }
    if method == "format" && value.as_str().is_some() {
        let args = args.iter().map(as_python_formats).collect::<Result<Vec<_>, _>>()?;
        return minijinja_contrib::pycompat::unknown_method_callback(state, value, method, &args);
    }
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, method, args)
    {
        return result;
    }
    if matches!(value.kind(), ValueKind::Map | ValueKind::Seq) && is_mutating(method) {
        return Err(invalid(format!("a template must not change its values ({method})")));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// What `str.format` makes of an argument whose text differs in minijinja.
fn as_python_formats(value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Seq => python::text(value).map(Value::from),
        _ => Ok(value.clone()),
    }
}

/// `value[::-1]`.
fn reversed(value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => {
            Ok(Value::from(value.as_str().unwrap_or_default().chars().rev().collect::<String>()))
        }
        ValueKind::Seq | ValueKind::Iterable if !is_generator(value) => {
            let mut items: Vec<Value> = value.try_iter()?.collect();
            items.reverse();
            Ok(Value::from(items))
        }
        ValueKind::Undefined => Err(Error::from(ErrorKind::UndefinedError)),
        kind => Err(invalid(format!("{kind} cannot be sliced"))),
    }
}

/// Methods that the immutable sandbox refuses.
fn is_mutating(method: &str) -> bool {
    [
        "append",
        "clear",
        "extend",
        "insert",
        "pop",
        "popitem",
        "remove",
        "reverse",
        "setdefault",
        "sort",
        "update",
    ]
    .contains(&method)
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let stripped = |left: bool, right: bool| -> Result<Value, Error> {
        let (chars,): (Option<Value>,) = from_args(args)?;
        let chars = chars.filter(|chars| !chars.is_none());
        let drops = |c: char| match chars.as_ref().and_then(Value::as_str) {
            Some(chars) => chars.contains(c),
            None => is_space(c),
        };
        let text = if left { text.trim_start_matches(drops) } else { text };
        Ok(Value::from(if right { text.trim_end_matches(drops) } else { text }))
    };
    let fixed = |pick: fn(&str, &str) -> String| -> Result<Value, Error> {
        let (affix,): (&str,) = from_args(args)?;
        Ok(Value::from(pick(text, affix)))
    };
    Some(match method {
        "strip" => stripped(true, true),
        "lstrip" => stripped(true, false),
        "rstrip" => stripped(false, true),
        "split" => split(text, args, false),
        "rsplit" => split(text, args, true),
        "partition" => partition(text, args, false),
        "rpartition" => partition(text, args, true),
        "removeprefix" => fixed(|text, affix| text.strip_prefix(affix).unwrap_or(text).to_string()),
        "removesuffix" => fixed(|text, affix| text.strip_suffix(affix).unwrap_or(text).to_string()),
        "zfill" => from_args::<(usize,)>(args).map(|(width,)| {
            let sign = text.len() - text.trim_start_matches(['+', '-']).len();
            let (sign, digits) = text.split_at(sign.min(1));
            let missing = width.min(10_000).saturating_sub(text.chars().count());
            Value::from(format!("{sign}{}{digits}", "0".repeat(missing)))
        }),
        "join" => from_args::<(&Value,)>(args).and_then(|(items,)| {
            let mut out = String::new();
            for (count, item) in items.try_iter()?.enumerate() {
                let Some(item) = item.as_str() else {
                    return Err(invalid("join: every item must be a string"));
                };
                if count > 0 {
                    out.push_str(text);
                }
                let _ = out.write_str(item);
            }
            Ok(Value::from(out))
        }),
        _ => return None,
    })
}

/// `str.split(sep=None, maxsplit=-1)` and `str.rsplit`.
fn split(text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (separator, most, options): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator: Option<Value> = separator.or(options.get("sep")?);
    let most = most.or(options.get("maxsplit")?).unwrap_or(-1);
    options.assert_all_used()?;
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let separator = separator.filter(|separator| !separator.is_none());
    let mut parts: Vec<&str> = Vec::new();
    match &separator {
        Some(separator) => {
            let separator = separator.as_str().filter(|text| !text.is_empty());
            let separator = separator.ok_or_else(|| invalid("split: empty separator"))?;
            let pieces = most.saturating_add(1);
            if from_right {
                parts.extend(text.rsplitn(pieces, separator));
                parts.reverse();
            } else {
                parts.extend(text.splitn(pieces, separator));
            }
        }
        None => {
            let mut rest = text.trim_matches(is_space);
            while !rest.is_empty() && parts.len() < most {
                let cut = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
                let Some(cut) = cut else { break };
                let (left, right) = rest.split_at(cut);
                if from_right {
                    parts.push(right.trim_start_matches(is_space));
                    rest = left.trim_end_matches(is_space);
                } else {
                    parts.push(left);
                    rest = right.trim_start_matches(is_space);
                }
            }
            if !rest.is_empty() {
                // Only the outer side was trimmed in Python when parts remain.
                parts.push(rest);
            }
            if from_right {
                parts.reverse();
            }
        }
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

fn partition(text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(invalid("partition: empty separator"));
    }
    let cut = if from_right { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match (cut, from_right) {
        (Some((left, right)), _) => [left, separator, right],
        (None, false) => [text, "", ""],
        (None, true) => ["", "", text],
    };
    Ok(Value::from(minijinja::value::Tuple::from(parts.map(Value::from).to_vec())))
}
