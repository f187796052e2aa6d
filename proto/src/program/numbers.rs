//! Numbers as the programs print them.

use std::fmt::Display;

/// `1 worker`, `2 workers`: of words whose plural has an s.
#[must_use]
pub fn counted<N: Display + PartialEq + From<u8>>(count: N, what: &str) -> String {
    let plural = if count == N::from(1) { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// A number of which two digits matter: a large model trains less than a sample a second on a CPU, a small one hundreds.
#[must_use]
pub fn rate(per_second: f64) -> String {
    let decimals = if per_second >= 10.0 || per_second <= 0.0 { 0 } else { (1.0 - per_second.log10().floor()).clamp(1.0, 6.0) as usize };
    format!("{per_second:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_singular_and_none_is_not() {
        assert_eq!([0_usize, 1, 2].map(|count| counted(count, "step")), ["0 steps", "1 step", "2 steps"]);
    }

    #[test]
    fn rates_have_two_digits_that_matter() {
        assert_eq!([0.0, 0.0123, 0.5, 4.26, 201.4].map(rate), ["0", "0.012", "0.50", "4.3", "201"]);
    }
}
