//! One figure.

use std::fmt;

use serde::Serialize;

/// A figure of ours next to a peer's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Our figure.
    pub ours: f64,
    /// What it is compared with, measured in the same run where it is a measurement.
    pub peer: f64,
    /// Unit of both.
    pub unit: &'static str,
    /// Ours / peer.
    pub ratio: f64,
    /// What the peer is and how both were measured.
    pub conditions: String,
}

impl Row {
    /// Works the ratio out.
    #[must_use]
    pub fn new(name: impl Into<String>, ours: f64, peer: f64, unit: &'static str, conditions: String) -> Self {
        Self {
            name: name.into(),
            ours: rounded(ours),
            peer: rounded(peer),
            unit,
            ratio: rounded(ours / peer),
            conditions,
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<46} {:>10} {:>10} {:<10} {:>7}  {}",
            self.name, self.ours, self.peer, self.unit, self.ratio, self.conditions
        )
    }
}

/// Four significant digits: none of these measurements is better than that.
fn rounded(value: f64) -> f64 {
    format!("{value:.3e}").parse().expect("a number that was just printed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_is_ours_by_peers() {
        let row = Row::new("a", 1234.56, 2469.12, "x", String::new());
        assert_eq!((row.ours, row.peer, row.ratio), (1235.0, 2469.0, 0.5));
        let json = serde_json::to_value(&row).expect("a row is JSON");
        for key in ["name", "ours", "peer", "unit", "ratio", "conditions"] {
            assert!(json.get(key).is_some(), "{key} is missing");
        }
    }
}
