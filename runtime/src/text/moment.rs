//! Python's `strftime`, for `strftime_now`.

use minijinja::{Error, ErrorKind};
use std::fmt::Write;

/// A moment for `strftime_now`, in the time zone that the prompt should show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Seconds since 1970-01-01 00:00:00 of that time zone.
    pub seconds: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Moment {
    /// Year, month (1..), day (1..), day of the year (1..).
    fn date(self) -> (i64, usize, i64, i64) {
        let mut days = self.seconds.div_euclid(86_400);
        let leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        // 400 years have 146,097 days.
        let mut year = 1970 + 400 * days.div_euclid(146_097);
        days = days.rem_euclid(146_097);
        while days >= 365 + i64::from(leap(year)) {
            days -= 365 + i64::from(leap(year));
            year += 1;
        }
        let of_year = days + 1;
        let february = 28 + i64::from(leap(year));
        let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        let mut month = 0;
        while days >= lengths[month] {
            days -= lengths[month];
            month += 1;
        }
        (year, month + 1, days + 1, of_year)
    }

    /// Python's `strftime` in the C locale.
    pub fn format(self, pattern: &str) -> Result<String, Error> {
        let (year, month, day, of_year) = self.date();
        let second = self.seconds.rem_euclid(86_400);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let weekday = (self.seconds.div_euclid(86_400) + 4).rem_euclid(7) as usize;
        let twelve = (hour + 11) % 12 + 1;
        let mut out = String::new();
        let mut chars = pattern.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut directive = chars.next();
            let bare = directive == Some('-');
            if bare {
                directive = chars.next();
            }
            let padded = |number: i64, width: usize| match bare {
                true => number.to_string(),
                false => format!("{number:0width$}"),
            };
            match directive {
                Some('Y') => out.push_str(&year.to_string()),
                Some('y') => out.push_str(&padded(year.rem_euclid(100), 2)),
                Some('m') => out.push_str(&padded(month as i64, 2)),
                Some('d') => out.push_str(&padded(day, 2)),
                Some('e') => {
                    let _ = write!(out, "{day:2}");
                }
                Some('j') => out.push_str(&padded(of_year, 3)),
                Some('H') => out.push_str(&padded(hour, 2)),
                Some('I') => out.push_str(&padded(twelve, 2)),
                Some('M') => out.push_str(&padded(minute, 2)),
                Some('S') => out.push_str(&padded(second, 2)),
                Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
                Some('B') => out.push_str(MONTHS[month - 1]),
                Some('b' | 'h') => out.push_str(&MONTHS[month - 1][..3]),
                Some('A') => out.push_str(DAYS[weekday]),
                Some('a') => out.push_str(&DAYS[weekday][..3]),
                Some('F') => {
                    let _ = write!(out, "{year}-{month:02}-{day:02}");
                }
                Some('T') => {
                    let _ = write!(out, "{hour:02}:{minute:02}:{second:02}");
                }
                Some('%') => out.push('%'),
                other => {
                    return Err(invalid(format!(
                        "strftime_now: %{} is not supported; supported: Y y m d e j H I M S p B b \
                         h A a F T %",
                        other.map_or(String::new(), String::from)
                    )));
                }
            }
        }
        Ok(out)
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let moment = Moment { seconds: 1_709_210_096 };
        assert_eq!(moment.format("%d %b %Y %H:%M:%S").unwrap(), "29 Feb 2024 12:34:56");
        assert_eq!(
            moment.format("%A, %B %-d, %F %j %I %p %%").unwrap(),
            "Thursday, February 29, 2024-02-29 060 12 PM %"
        );
        let before = Moment { seconds: -1 };
        assert_eq!(before.format("%F %T %a").unwrap(), "1969-12-31 23:59:59 Wed");
        assert!(moment.format("%Q").is_err());
    }
}
