//! Two modes of one thing, compared on one machine at one time.
//!
//! The modes run in turn, and which comes first alternates, so that whatever else the machine does
//! meets both. Each pair gives one ratio; what is reported is the median of the ratios and its 95%
//! confidence interval, taken from the order statistics of the ratios (the inverted sign test).
//! That interval assumes nothing of how times are distributed, which on a shared machine have
//! tails that no normal distribution has: a few pairs gone wild cannot move it.

use std::fmt;
use std::io;

use serde::Serialize;

/// Fewer pairs than this are not worth an interval.
pub const MIN_PAIRS: usize = 15;

/// A median and the interval that holds the true one in 95 of 100 cases.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// The median.
    pub median: f64,
    /// Its upper end.
    pub high: f64,
}

impl Interval {
    /// Of the values of one quantity, in any order.
    ///
    /// # Panics
    /// Without values.
    pub fn of(values: &[f64]) -> Self {
        let sorted = sorted(values);
        let beyond = outside(sorted.len());
        Self {
            low: sorted[beyond],
            median: median(&sorted),
            high: sorted[sorted.len() - 1 - beyond],
        }
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} [{:.2}, {:.2}]", self.median, self.low, self.high)
    }
}

/// How many values at either end lie outside the interval: as many as leave 95%.
///
/// Each value is below the true median with probability 1/2. The interval misses it on one side
/// only if at most this many values are on the other, which is a matter of counting coins.
fn outside(count: usize) -> usize {
    let mut exactly = 0.5f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut at_most = exactly;
    let mut beyond = 0;
    loop {
        exactly *= (count - beyond) as f64 / (beyond + 1) as f64;
        at_most += exactly;
        if at_most > 0.025 {
            return beyond;
        }
        beyond += 1;
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// What is said of a quantity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Claim {
    /// It is not more than this.
    AtMost(f64),
    /// It is not less than this.
    AtLeast(f64),
}

impl Claim {
    /// What the interval says of the claim.
    pub fn verdict(self, interval: Interval) -> Verdict {
        let (right, wrong) = match self {
            Self::AtMost(limit) => (interval.high <= limit, interval.low > limit),
            Self::AtLeast(limit) => (interval.low >= limit, interval.high < limit),
        };
        match (right, wrong) {
            (true, _) => Verdict::Holds,
            (_, true) => Verdict::Fails,
            _ => Verdict::CannotTell,
        }
    }
}

/// What came of a claim on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The whole interval is on its side.
    Holds,
    /// The whole interval is on the other side.
    Fails,
    /// The limit is inside the interval.
    CannotTell,
}

impl Verdict {
    /// Of a claim that was counted, not estimated.
    pub fn counted(right: bool) -> Self {
        if right { Self::Holds } else { Self::Fails }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Holds => "holds",
            Self::Fails => "FAILS",
            Self::CannotTell => "cannot tell here",
        })
    }
}

/// The least and the middle of the values of one mode.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The least.
    pub min: f64,
    /// The median.
    pub median: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let sorted = sorted(values);
        Self { min: sorted[0], median: median(&sorted) }
    }
}

/// Two modes compared.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Comparison {
    /// Of this many pairs.
    pub pairs: usize,
    /// The mode in question.
    pub ours: Spread,
    /// What it is held against.
    pub baseline: Spread,
    /// The first divided by the second.
    pub ratio: Interval,
}

/// Runs two modes in turn and compares what they measure.
pub fn compare(
    pairs: usize,
    mut ours: impl FnMut() -> io::Result<f64>,
    mut baseline: impl FnMut() -> io::Result<f64>,
) -> io::Result<Comparison> {
    let pairs = pairs.max(MIN_PAIRS);
    let (mut left, mut right) = (Vec::with_capacity(pairs), Vec::with_capacity(pairs));
    for nth in 0..pairs {
        if nth % 2 == 0 {
            left.push(ours()?);
            right.push(baseline()?);
        } else {
            right.push(baseline()?);
            left.push(ours()?);
        }
    }
    let ratios: Vec<f64> = left.iter().zip(&right).map(|(ours, base)| ours / base).collect();
    Ok(Comparison {
        pairs,
        ours: Spread::of(&left),
        baseline: Spread::of(&right),
        ratio: Interval::of(&ratios),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranks_are_those_of_the_sign_test() {
        // From the tables of the binomial distribution.
        let known = [(6, 0), (9, 1), (15, 3), (16, 3), (20, 5), (25, 7), (30, 9), (100, 39)];
        for (count, beyond) in known {
            assert_eq!(outside(count), beyond, "of {count}");
        }
    }

    #[test]
    fn known_ratios_have_a_known_interval() {
        let values: Vec<f64> = (1..=15).rev().map(f64::from).collect();
        assert_eq!(Interval::of(&values), Interval { low: 4.0, median: 8.0, high: 12.0 });
        let even: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!(Interval::of(&even), Interval { low: 6.0, median: 10.5, high: 15.0 });
    }

    #[test]
    fn three_pairs_gone_wild_do_not_move_the_interval() {
        let mut values = vec![1.0; 15];
        values[..3].fill(1000.0);
        assert_eq!(Interval::of(&values), Interval { low: 1.0, median: 1.0, high: 1.0 });
    }

    /// Numbers with a heavy tail, always the same ones.
    fn tailed(state: &mut u64) -> f64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let uniform = ((*state >> 33) as f64 + 0.5) / f64::from(1u32 << 31);
        1.0 / (1.0 - uniform) // its median is 2, its mean is infinite
    }

    #[test]
    fn the_interval_covers_the_true_median_as_often_as_it_says() {
        let mut state = 1;
        let covered = (0..2000).filter(|_| {
            let values: Vec<f64> = (0..15).map(|_| tailed(&mut state)).collect();
            let interval = Interval::of(&values);
            interval.low <= 2.0 && 2.0 <= interval.high
        });
        let share = covered.count() as f64 / 2000.0;
        assert!((0.95..0.98).contains(&share), "{share}"); // 96.5% by the table
    }

    #[test]
    fn a_claim_holds_or_fails_or_cannot_be_told() {
        let interval = Interval { low: 0.9, median: 1.0, high: 1.1 };
        let verdicts = [1.2, 1.1, 1.0, 0.9, 0.8].map(|x| Claim::AtMost(x).verdict(interval));
        use Verdict::*;
        assert_eq!(verdicts, [Holds, Holds, CannotTell, CannotTell, Fails]);
        let verdicts = [0.8, 0.9, 1.0, 1.1, 1.2].map(|x| Claim::AtLeast(x).verdict(interval));
        assert_eq!(verdicts, [Holds, Holds, CannotTell, CannotTell, Fails]);
    }

    #[test]
    fn modes_run_in_turn_and_each_goes_first_as_often() {
        let order = std::cell::RefCell::new(String::new());
        let mode = |name: char, value: f64| {
            let order = &order;
            move || {
                order.borrow_mut().push(name);
                Ok(value)
            }
        };
        let compared = compare(1, mode('a', 3.0), mode('b', 2.0)).unwrap();
        assert_eq!(compared.pairs, MIN_PAIRS);
        assert_eq!(order.borrow().as_str(), "abba".repeat(8)[..30].to_owned());
        assert_eq!(compared.ratio, Interval { low: 1.5, median: 1.5, high: 1.5 });
    }
}
