//! Lists in JSON that are read up to a limit, so that no file takes many times
//! its size in memory.

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// Reads at most `most` values, which are called `what`.
pub struct List<T, U> {
    most: usize,
    what: &'static str,
    of: PhantomData<(T, U)>,
}

impl<T, U> List<T, U> {
    pub fn new(most: usize, what: &'static str) -> Self {
        Self { most, what, of: PhantomData }
    }
}

impl<'de, T: Deserialize<'de>, U: From<T>> DeserializeSeed<'de> for List<T, U> {
    type Value = Vec<U>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<U>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, T: Deserialize<'de>, U: From<T>> Visitor<'de> for List<T, U> {
    type Value = Vec<U>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {}", self.what)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Vec<U>, A::Error> {
        let mut all = Vec::new();
        while let Some(value) = values.next_element::<T>()? {
            if all.len() == self.most {
                return Err(A::Error::custom(format!("more than {} {}", self.most, self.what)));
            }
            all.push(value.into());
        }
        Ok(all)
    }
}
