//! Cutting numbers out of the kernel's text.

/// A file of `/proc` that does not read as the kernel documents it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("Bad {field} in /proc/<pid>/{file}: {text:?}")]
pub struct ParseError {
    /// Name of the file in `/proc/<pid>`.
    pub file: &'static str,
    /// What could not be read.
    pub field: &'static str,
    /// The start of the offending text.
    pub text: String,
}

impl ParseError {
    /// An error about `text`, of which the first 80 bytes are kept.
    pub(super) fn new(file: &'static str, field: &'static str, text: &[u8]) -> Self {
        let shown = &text[..text.len().min(80)];
        ParseError {
            file,
            field,
            text: String::from_utf8_lossy(shown).into_owned(),
        }
    }
}

/// An unsigned decimal number that is the whole of `text`.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |sum, byte| {
        let digit = byte.wrapping_sub(b'0');
        (digit < 10)
            .then(|| sum.checked_mul(10)?.checked_add(u64::from(digit)))
            .flatten()
    })
}

/// A signed decimal number that is the whole of `text`.
pub(super) fn signed(text: &[u8]) -> Option<i64> {
    match text.strip_prefix(b"-") {
        Some(rest) => decimal(rest).and_then(|n| 0i64.checked_sub_unsigned(n)),
        None => decimal(text).and_then(|n| i64::try_from(n).ok()),
    }
}

/// A hexadecimal number, lower or upper case, that is the whole of `text`.
pub(super) fn hex(text: &[u8]) -> Option<u64> {
    based(text, 16)
}

/// An octal number that is the whole of `text`.
pub(super) fn octal(text: &[u8]) -> Option<u64> {
    based(text, 8)
}

fn based(text: &[u8], radix: u32) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |sum, &byte| {
        let digit = char::from(byte).to_digit(radix)?;
        sum.checked_mul(u64::from(radix))?
            .checked_add(u64::from(digit))
    })
}

/// Lines without their line feed.
pub(super) fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|&b| b == b'\n').filter(|line| !line.is_empty())
}

/// Words between blanks and tabs.
pub(super) fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|b| matches!(b, b' ' | b'\t'))
        .filter(|word| !word.is_empty())
}

/// Undoes the kernel's octal escapes (`\040` for a blank, `\012` for a line feed).
pub(super) fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let escape = (text[at] == b'\\')
            .then(|| text.get(at + 1..at + 4))
            .flatten();
        match escape.and_then(octal).and_then(|n| u8::try_from(n).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(text[at]);
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_whole_or_nothing() {
        assert_eq!(decimal(b"18446744073709551615"), Some(u64::MAX));
        assert_eq!(decimal(b"18446744073709551616"), None);
        assert_eq!(decimal(b"1 "), None);
        assert_eq!(decimal(b""), None);
        assert_eq!(signed(b"-9223372036854775808"), Some(i64::MIN));
        assert_eq!(signed(b"--1"), None);
        assert_eq!(hex(b"7fFf"), Some(0x7fff));
        assert_eq!(hex(b"0x1"), None);
        assert_eq!(octal(b"8"), None);
    }

    #[test]
    fn escapes_are_undone_and_lone_backslashes_kept() {
        assert_eq!(unescape(br"a\040b\134c"), b"a b\\c");
        assert_eq!(unescape(br"end\04"), br"end\04");
        assert_eq!(unescape(br"\777"), br"\777");
    }
}
