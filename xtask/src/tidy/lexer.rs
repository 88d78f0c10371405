//! Rust source with comments and literals blanked out, line by line, so that words and braces
//! can be found by looking.

/// The text with the same lines and columns, but only code in it.
pub(super) fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let end = token_end(bytes, at);
        let keep = end == at + 1 && !is_quote_start(bytes, at);
        for &byte in &bytes[at..end] {
            out.push(if keep || byte == b'\n' { byte } else { b' ' });
        }
        at = end;
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn is_quote_start(bytes: &[u8], at: usize) -> bool {
    bytes[at] == b'"'
}

/// Where the comment or literal that starts at `at` ends; `at + 1` where none does.
fn token_end(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    if rest.starts_with(b"//") {
        return at
            + rest
                .iter()
                .position(|byte| *byte == b'\n')
                .unwrap_or(rest.len());
    }
    if rest.starts_with(b"/*") {
        return block_comment_end(bytes, at);
    }
    let word_before = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    if !word_before && let Some(end) = raw_string_end(bytes, at) {
        return end;
    }
    match rest[0] {
        b'"' => quoted_end(bytes, at + 1, b'"'),
        b'\'' => char_end(bytes, at),
        _ => at + 1,
    }
}

fn block_comment_end(bytes: &[u8], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            (at, depth) = (at + 2, depth + 1);
        } else if bytes[at..].starts_with(b"*/") {
            (at, depth) = (at + 2, depth - 1);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

/// `r"..."`, `r#"..."#`, `br#"..."#`.
fn raw_string_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    at += usize::from(matches!(bytes[at], b'b' | b'c'));
    if bytes.get(at) != Some(&b'r') {
        return None;
    }
    let hashes = bytes[at + 1..]
        .iter()
        .take_while(|byte| **byte == b'#')
        .count();
    let open = at + 1 + hashes;
    if bytes.get(open) != Some(&b'"') {
        return None;
    }
    let closing: Vec<u8> = std::iter::once(b'"')
        .chain(std::iter::repeat_n(b'#', hashes))
        .collect();
    let found = bytes[open + 1..]
        .windows(closing.len())
        .position(|window| window == closing);
    Some(found.map_or(bytes.len(), |found| open + 1 + found + closing.len()))
}

/// Behind the closing `quote`, past escapes.
fn quoted_end(bytes: &[u8], mut at: usize, quote: u8) -> usize {
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// A character literal, or a lifetime, which ends at once.
fn char_end(bytes: &[u8], at: usize) -> usize {
    let is_escape = bytes.get(at + 1) == Some(&b'\\');
    let width = std::str::from_utf8(&bytes[at + 1..bytes.len().min(at + 5)])
        .map_or_else(|error| error.valid_up_to(), str::len)
        .min(4);
    let closes = (1..=width).any(|length| {
        bytes.get(at + 1 + length) == Some(&b'\'') && is_one_char(&bytes[at + 1..=at + length])
    });
    if is_escape || closes {
        quoted_end(bytes, at + 1, b'\'')
    } else {
        at + 1
    }
}

fn is_one_char(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| text.chars().count() == 1)
}

#[cfg(test)]
mod tests {
    use super::code_only;

    #[test]
    fn only_code_is_left() {
        let cases = [
            ("a // unsafe", "a"),
            ("a /* { /* } */ */ b", "a b"),
            (r#"f("{ \" }") }"#, "f( ) }"),
            ("x = '{'; 'a: loop {}", "x = ; 'a: loop {}"),
            ("r#\"a\"b\"# {", "{"),
            (r"c = '\''; }", "c = ; }"),
            ("let ä = 'ä'; &'a str", "let ä = ; &'a str"),
        ];
        for (text, expected) in cases {
            let code = code_only(text);
            assert_eq!(code.len(), text.len(), "{text}");
            assert_eq!(
                code.split_whitespace().collect::<Vec<_>>().join(" "),
                expected,
                "{text}"
            );
        }
    }
}
