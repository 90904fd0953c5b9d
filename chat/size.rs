//! Amounts of memory as people write them.

use std::str::FromStr;

/// What `--ram` says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    Bytes(u64),
    /// Of the model's files.
    Share(f64),
}

impl Size {
    /// In bytes, for a model of `model_bytes`.
    pub fn of(self, model_bytes: u64) -> u64 {
        match self {
            Size::Bytes(bytes) => bytes,
            Size::Share(share) => (model_bytes as f64 * share) as u64,
        }
    }
}

const ALLOWED: &str = "a size is allowed: 1.5G or 1.5GiB (2^30 bytes), 800M, 2GB (10^9 bytes), or \
                       50% of the model's files";

/// Where nothing is there to take a share of.
pub fn absolute(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(Size::Bytes(bytes)) => Ok(bytes),
        _ => {
            Err("a size is allowed: 1.5G or 1.5GiB (2^30 bytes), 800M, 2GB (10^9 bytes)"
                .to_string())
        }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: f64 = number.parse().map_err(|_| ALLOWED.to_string())?;
        let unit = unit.trim().to_ascii_lowercase();
        if unit == "%" {
            let share = number / 100.0;
            return match share > 0.0 && share <= 100.0 {
                true => Ok(Size::Share(share)),
                false => Err(ALLOWED.to_string()),
            };
        }
        let scale: f64 = match unit.as_str() {
            "" | "b" => 1.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "tb" => 1e12,
            "k" | "kib" => 1024.0,
            "m" | "mib" => 1_048_576.0,
            "g" | "gib" => 1_073_741_824.0,
            "t" | "tib" => 1_099_511_627_776.0,
            _ => return Err(ALLOWED.to_string()),
        };
        let bytes = number * scale;
        // Larger than any memory, and still far from where f64 has gaps.
        match (1.0..1e18).contains(&bytes) {
            true => Ok(Size::Bytes(bytes as u64)),
            false => Err(ALLOWED.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_written() {
        for (text, bytes) in [
            ("1.5G", 1_610_612_736),
            ("1.5GiB", 1_610_612_736),
            ("1.5gb", 1_500_000_000),
            ("800 MiB", 838_860_800),
            ("800m", 838_860_800),
            ("1k", 1024),
            ("123456", 123_456),
            ("7b", 7),
            ("2T", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size::Bytes(bytes)), "{text}");
        }
        assert_eq!("50%".parse::<Size>().map(|size| size.of(1001)), Ok(500));
        assert_eq!("12.5 %".parse::<Size>().map(|size| size.of(800)), Ok(100));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "G",
            "-1G",
            "1,5G",
            "1e9",
            "NaN",
            "inf",
            "1.5.2G",
            "0",
            "0%",
            "0.4b",
            "-5%",
            "10001%",
            "4 GBs",
            "4X",
            "lots",
            "%",
            "99999999999T",
            ".",
            "+1G",
        ] {
            let error = text.parse::<Size>().expect_err(text);
            assert!(error.contains("allowed"), "{error}");
        }
    }
}
