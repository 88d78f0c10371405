//! Bytes as text (base64 in lines, quoted-printable) and JSON as Python's `json` writes it.

use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize as _;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::Style;

/// Bytes that make up one line of base64 (76 characters, RFC 2045).
const BASE64_LINE: usize = 57;
/// Longest line of quoted-printable text (RFC 2045).
const QUOTED_LINE: usize = 76;

/// Bytes in base64, each line with its end.
pub fn to_base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() / 3 * 4 + bytes.len() / BASE64_LINE + 8);
    for line in bytes.chunks(BASE64_LINE) {
        STANDARD.encode_string(line, &mut text);
        text.push('\n');
    }
    text
}

/// The bytes of a base64 text, whose white space does not count; `None` when it is none.
pub fn from_base64(text: &str) -> Option<Vec<u8>> {
    let packed: Vec<u8> = text
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    STANDARD.decode(packed).ok()
}

/// Bytes as quoted-printable text in lines of at most 76 characters.
pub fn to_quoted(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut column = 0;
    // A carriage return alone, or mixed line ends, would not come back the same.
    let has_return = bytes.contains(&b'\r');
    for (place, byte) in bytes.iter().copied().enumerate() {
        let next = bytes.get(place + 1).copied();
        if byte == b'\n' && !has_return {
            quote_trailing_blank(&mut text);
            text.push('\n');
            column = 0;
            continue;
        }
        let ends_line = matches!(next, None | Some(b'\n'));
        let quoted = match byte {
            b'=' => true,
            // A dot alone on a line would end a mail.
            b'.' => column == 0 && matches!(next, None | Some(b'\n' | b'\r' | 0)),
            b' ' | b'\t' => next.is_none(),
            33..=126 => false,
            _ => true,
        };
        let width = if quoted { 3 } else { 1 };
        if column + width >= QUOTED_LINE && (quoted || !ends_line) {
            text.push_str("=\n");
            column = 0;
        }
        column += width;
        if quoted {
            text.push_str(&format!("={byte:02X}"));
        } else {
            text.push(char::from(byte));
        }
    }
    text
}

fn quote_trailing_blank(text: &mut String) {
    let quoted = match text.as_bytes().last() {
        Some(b' ') => "=20",
        Some(b'\t') => "=09",
        _ => return,
    };
    text.pop();
    text.push_str(quoted);
}

/// The bytes of a quoted-printable text; `None` when an escape is damaged.
pub fn from_quoted(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte != b'=' {
            bytes.push(*byte);
            continue;
        }
        if let Some(after) = rest
            .strip_prefix(b"\r\n")
            .or_else(|| rest.strip_prefix(b"\n"))
        {
            rest = after;
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok()?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = after;
    }
    Some(bytes)
}

/// JSON as Python's `json` module writes it: only ASCII, a space after each separator.
pub fn render(value: &Value, style: Style) -> String {
    let mut text = Vec::new();
    let written = match style {
        Style::Plain => value.serialize(&mut Serializer::with_formatter(&mut text, Ascii(Spaced))),
        Style::Pretty => {
            let indented = Ascii(PrettyFormatter::with_indent(b"    "));
            value.serialize(&mut Serializer::with_formatter(&mut text, indented))
        }
    };
    written.expect("writing to memory does not fail");
    String::from_utf8(text).expect("the formatter writes ASCII only")
}

/// One line with a space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: io::Write + ?Sized>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }

    fn begin_object_key<W: io::Write + ?Sized>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, to: &mut W) -> io::Result<()> {
        to.write_all(b": ")
    }
}

/// Escapes all that is not ASCII; else as the formatter inside.
struct Ascii<F>(F);

impl<F: Formatter> Formatter for Ascii<F> {
    fn write_string_fragment<W: io::Write + ?Sized>(
        &mut self,
        to: &mut W,
        text: &str,
    ) -> io::Result<()> {
        for letter in text.chars() {
            if letter.is_ascii() {
                to.write_all(&[letter as u8])?;
                continue;
            }
            for unit in letter.encode_utf16(&mut [0; 2]) {
                write!(to, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }

    fn begin_array<W: io::Write + ?Sized>(&mut self, to: &mut W) -> io::Result<()> {
        self.0.begin_array(to)
    }

    fn end_array<W: io::Write + ?Sized>(&mut self, to: &mut W) -> io::Result<()> {
        self.0.end_array(to)
    }

    fn begin_array_value<W: io::Write + ?Sized>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_array_value(to, first)
    }

    fn end_array_value<W: io::Write + ?Sized>(&mut self, to: &mut W) -> io::Result<()> {
        self.0.end_array_value(to)
    }

    fn begin_object<W: io::Write + ?Sized>(&mut self, to: &mut W) -> io::Result<()> {
        self.0.begin_object(to)
    }

    fn end_object<W: io::Write + ?Sized>(&mut self, to: &mut W) -> io::Result<()> {
        self.0.end_object(to)
    }

    fn begin_object_key<W: io::Write + ?Sized>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_object_key(to, first)
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, to: &mut W) -> io::Result<()> {
        self.0.begin_object_value(to)
    }

    fn end_object_value<W: io::Write + ?Sized>(&mut self, to: &mut W) -> io::Result<()> {
        self.0.end_object_value(to)
    }
}
