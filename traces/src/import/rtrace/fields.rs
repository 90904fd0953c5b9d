//! Fields of a manifest of which a file may have any number or any kind: read
//! up to a limit, without a copy of what they hold.

use crate::Sequence;
use crate::bounded::List;
use crate::limits::{MAX_LAYERS, MAX_SEQUENCES};
use serde::de::value::MapAccessDeserializer;
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use std::collections::BTreeMap;
use std::fmt;

/// A trace has three files.
const MAX_DIGESTS: usize = 16;

/// Which layers were recorded.
#[derive(Clone, Debug)]
pub enum Layers {
    Words(String),
    Numbers(Vec<usize>),
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Layers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("numbers of layers, or words such as \"1..26\"")
            }

            fn visit_str<E: Error>(self, words: &str) -> Result<Layers, E> {
                Ok(Layers::Words(words.to_string()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, numbers: A) -> Result<Layers, A::Error> {
                List::<usize, usize>::new(MAX_LAYERS, "layers")
                    .visit_seq(numbers)
                    .map(Layers::Numbers)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

pub fn sequences<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Sequence>, D::Error> {
    List::<Entry, Sequence>::new(MAX_SEQUENCES, "sequences").deserialize(deserializer)
}

/// `[start, len]`, or the same by name and with labels.
struct Entry(Sequence);

impl From<Entry> for Sequence {
    fn from(entry: Entry) -> Self {
        entry.0
    }
}

#[derive(serde::Deserialize)]
struct Named {
    start: u64,
    len: u64,
    #[serde(default)]
    dataset: Option<String>,
    #[serde(default)]
    category: Option<String>,
    #[serde(default)]
    repetition: Option<bool>,
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Entry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a sequence: [start, len] or {\"start\", \"len\"}")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<Entry, A::Error> {
                let short = |found| A::Error::invalid_length(found, &self);
                let start = pair.next_element()?.ok_or_else(|| short(0))?;
                let tokens = pair.next_element()?.ok_or_else(|| short(1))?;
                match pair.next_element::<IgnoredAny>()? {
                    Some(_) => Err(A::Error::invalid_length(3, &self)),
                    None => Ok(Entry(Sequence { start, tokens, ..Sequence::default() })),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Entry, A::Error> {
                let Named { start, len, dataset, category, repetition } =
                    Named::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Entry(Sequence {
                    start,
                    tokens: len,
                    dataset: dataset.unwrap_or_default(),
                    category: category.unwrap_or_default(),
                    is_repetitive: repetition.unwrap_or(false),
                }))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

pub fn digests<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    struct Digests;
    impl<'de> Visitor<'de> for Digests {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("digests of files")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut all = BTreeMap::new();
            while let Some((name, digest)) = map.next_entry()? {
                if all.len() == MAX_DIGESTS {
                    return Err(A::Error::custom(format!("more than {MAX_DIGESTS} digests")));
                }
                all.insert(name, digest);
            }
            Ok(all)
        }
    }
    deserializer.deserialize_map(Digests)
}
