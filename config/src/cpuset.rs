//! Sets of CPU numbers in the grammar that libvirt made customary: `0-4,^3,8`.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// A set of CPU numbers, 0 to [`CpuSet::MAX`].
///
/// Also used for sets of vCPUs and queues, which are written the same way.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct CpuSet {
    /// Bit `n % 64` of word `n / 64`; the last word is never zero, so equal sets are equal vectors.
    words: Vec<u64>,
}

/// Why a text is not a CPU set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuSetError {
    /// No number in the text.
    #[error("the set is empty")]
    Empty,
    /// An element is neither `N`, `N-M` nor `^N`.
    #[error("`{0}` is neither a number, a range like `2-5`, nor an exclusion like `^3`")]
    Garbage(String),
    /// `5-2`.
    #[error("the range `{0}-{1}` runs backwards")]
    Reverse(u32, u32),
    /// Beyond [`CpuSet::MAX`].
    #[error("`{0}` is beyond the largest number, {max}", max = CpuSet::MAX)]
    TooBig(String),
    /// `^N` without an N before it.
    #[error("`^{0}` excludes nothing: it must follow the range it cuts from")]
    ExcludesNothing(String),
}

impl CpuSet {
    /// The largest number a set may hold.
    pub const MAX: u32 = 8191;

    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `cpu`.
    ///
    /// # Panics
    /// If `cpu` is greater than [`CpuSet::MAX`].
    pub fn insert(&mut self, cpu: u32) {
        assert!(cpu <= Self::MAX, "CPU {cpu} is beyond {}", Self::MAX);
        let word = cpu as usize / 64;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (cpu % 64);
    }

    /// Takes `cpu` out; was it in?
    pub fn remove(&mut self, cpu: u32) -> bool {
        let had = self.contains(cpu);
        if had {
            self.words[cpu as usize / 64] &= !(1 << (cpu % 64));
            while self.words.last() == Some(&0) {
                self.words.pop();
            }
        }
        had
    }

    /// Is `cpu` in the set?
    pub fn contains(&self, cpu: u32) -> bool {
        self.words.get(cpu as usize / 64).is_some_and(|word| word >> (cpu % 64) & 1 == 1)
    }

    /// The numbers, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0u32..).zip(&self.words).flat_map(|(index, &word)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index * 64 + bit)
        })
    }

    /// How many numbers are in the set.
    pub fn len(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Is nothing in the set?
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The smallest number.
    pub fn first(&self) -> Option<u32> {
        self.iter().next()
    }

    /// The largest number.
    pub fn last(&self) -> Option<u32> {
        let word = self.words.last()?;
        Some(self.words.len() as u32 * 64 - 1 - word.leading_zeros())
    }

    /// Is any number in both sets?
    pub fn intersects(&self, other: &Self) -> bool {
        self.words.iter().zip(&other.words).any(|(a, b)| a & b != 0)
    }

    /// The numbers in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.iter().filter(|&cpu| other.contains(cpu)).collect()
    }

    /// The numbers of this set that are not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        self.iter().filter(|&cpu| !other.contains(cpu)).collect()
    }
}

impl CpuSet {
    /// The set as a phrase: "queue 3", "queues 0-2".
    pub(crate) fn counted(&self, noun: &str) -> String {
        format!("{noun}{} {self}", if self.len() == 1 { "" } else { "s" })
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> Self {
        let mut set = Self::new();
        set.extend(cpus);
        set
    }
}

impl Extend<u32> for CpuSet {
    fn extend<I: IntoIterator<Item = u32>>(&mut self, cpus: I) {
        for cpu in cpus {
            self.insert(cpu);
        }
    }
}

impl FromStr for CpuSet {
    type Err = CpuSetError;

    fn from_str(text: &str) -> Result<Self, CpuSetError> {
        let mut set = Self::new();
        if text.trim().is_empty() {
            return Err(CpuSetError::Empty);
        }
        for element in text.split(',').map(str::trim) {
            let (exclude, range) = match element.strip_prefix('^') {
                Some(rest) => (true, rest),
                None => (false, element),
            };
            let (first, last) = match range.split_once('-') {
                Some((first, last)) => (number(first, element)?, number(last, element)?),
                None => (number(range, element)?, number(range, element)?),
            };
            if first > last {
                return Err(CpuSetError::Reverse(first, last));
            }
            if !exclude {
                set.extend(first..=last);
            } else if !(first..=last).fold(false, |any, cpu| set.remove(cpu) | any) {
                return Err(CpuSetError::ExcludesNothing(range.to_owned()));
            }
        }
        if set.is_empty() { Err(CpuSetError::Empty) } else { Ok(set) }
    }
}

/// One number of `element`; digits only, because `u32::from_str` would take a `+`.
fn number(text: &str, element: &str) -> Result<u32, CpuSetError> {
    let text = text.trim();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(CpuSetError::Garbage(excerpt(element)));
    }
    match text.parse() {
        Ok(cpu) if cpu <= CpuSet::MAX => Ok(cpu),
        _ => Err(CpuSetError::TooBig(excerpt(text))),
    }
}

/// Enough of `text` to recognise it, safe to print on a terminal.
pub(crate) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 40;
    let mut short: String = text.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if text.chars().nth(LONGEST).is_some() {
        short.push('…');
    }
    short
}

/// The shortest way to write the set, ascending: `0-2,4,8`.
impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.iter().peekable();
        let mut comma = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while let Some(next) = cpus.next_if_eq(&(last + 1)) {
                last = next;
            }
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
            comma = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuSet({self})")
    }
}

impl Serialize for CpuSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canonical(text: &str) -> String {
        text.parse::<CpuSet>().unwrap_or_else(|error| panic!("{text}: {error}")).to_string()
    }

    #[test]
    fn reads_and_writes_the_grammar() {
        assert_eq!(canonical("0-4,^3,8"), "0-2,4,8");
        assert_eq!(canonical(" 8 , 1 - 2,0"), "0-2,8");
        assert_eq!(canonical("0-7,^2-5"), "0-1,6-7");
        assert_eq!(canonical("0-4,^3,3"), "0-4");
        assert_eq!(canonical("1023-1025,8191"), "1023-1025,8191");
        assert_eq!(canonical("63,64"), "63-64");
    }

    #[test]
    fn says_what_is_wrong() {
        use CpuSetError::*;
        let error = |text: &str| text.parse::<CpuSet>().unwrap_err();
        assert_eq!(error(""), Empty);
        assert_eq!(error("  "), Empty);
        assert_eq!(error("3,^3"), Empty);
        assert_eq!(error("5-2"), Reverse(5, 2));
        for garbage in ["a", "1,,2", "1-", "-1", "+1", "1-2-3", "^", "^^1", "0x1", "١"] {
            assert!(matches!(error(garbage), Garbage(_)), "{garbage}");
        }
        assert_eq!(error("8192"), TooBig("8192".into()));
        assert!(matches!(error(&"9".repeat(100_000)), TooBig(text) if text.len() < 200));
        assert_eq!(error("^3,0-4"), ExcludesNothing("3".into()));
    }

    #[test]
    fn knows_its_members() {
        let set: CpuSet = "1,64,70".parse().unwrap();
        assert_eq!(set.iter().collect::<Vec<_>>(), [1, 64, 70]);
        assert_eq!((set.len(), set.first(), set.last()), (3, Some(1), Some(70)));
        assert!(set.contains(64) && !set.contains(65) && !set.contains(9000));
        assert!(set.intersects(&"64-65".parse().unwrap()));
        assert!(!set.intersects(&"2-63".parse().unwrap()));
        assert_eq!(set.difference(&"64".parse().unwrap()).to_string(), "1,70");
        assert_eq!(set.intersection(&"64-99".parse().unwrap()).to_string(), "64,70");
        assert_eq!((CpuSet::new().last(), CpuSet::new().is_empty()), (None, true));
    }

    proptest! {
        #[test]
        fn survives_a_round_trip(cpus in prop::collection::btree_set(0u32..=CpuSet::MAX, 1..200)) {
            let set: CpuSet = cpus.iter().copied().collect();
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), cpus.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(set.to_string().parse::<CpuSet>().unwrap(), set);
        }

        #[test]
        fn never_panics(text in "[-0-9,^ a\u{661}]{0,40}") {
            drop(text.parse::<CpuSet>());
        }
    }
}
