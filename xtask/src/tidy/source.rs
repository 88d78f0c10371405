//! Rules about one source file.

use std::path::Path;

use super::Finding;
use super::lexer::code_only;

/// Longest file, in lines.
const FILE_LINES: usize = 600;
/// Longest function, in lines from its first to its closing brace. Style asks for about 70.
const FUNCTION_LINES: usize = 80;
/// Crates that talk to the kernel by hand.
const UNSAFE_CRATES: [&str; 3] = ["floe-kernel", "floe-inject", "testkit"];
/// Crates that talk to people and read the environment.
const PRINTING_CRATES: [&str; 3] = ["floe", "xtask", "testkit"];
/// What a library must be told instead of looking for it.
const ENVIRONMENT: [&str; 6] = [
    "env::var",
    "env::set_var",
    "env::args",
    "env::current_dir",
    "env::current_exe",
    "env::temp_dir",
];
/// Names that say nothing.
const EMPTY_NAMES: [&str; 7] = [
    "utils", "util", "common", "misc", "helper", "helpers", "shared",
];

/// Checks one file; `file` is relative to the root.
pub(super) fn check(file: &Path, text: &str) -> Vec<Finding> {
    let source = Source::new(file, text);
    let mut findings = Vec::new();
    let count = text.lines().count();
    if count > FILE_LINES {
        findings.push(source.finding(
            FILE_LINES,
            format!("the file has {count} lines, {FILE_LINES} are the most"),
        ));
    }
    source.names(&mut findings);
    source.words(&mut findings);
    source.functions(&mut findings);
    source.forbids_unsafe(text, &mut findings);
    findings
}

struct Source<'a> {
    file: &'a Path,
    /// The crate, by its directory.
    krate: &'a str,
    /// Part of the product, not of its tests or its build.
    is_product: bool,
    code: String,
    /// The line (from 0) at which the module of unit tests begins, or the number of lines.
    tests_from: usize,
}

impl<'a> Source<'a> {
    fn new(file: &'a Path, text: &str) -> Self {
        let parts: Vec<&str> = file.iter().filter_map(|part| part.to_str()).collect();
        let krate = match parts.as_slice() {
            ["crates", name, ..] => name,
            [name, ..] => name,
            [] => "",
        };
        let code = code_only(text);
        let tests_from = code.lines().position(|line| {
            let line = line.trim();
            line == "#[cfg(test)]" || line == "#![cfg(test)]"
        });
        let tests_from = tests_from.unwrap_or(code.lines().count());
        let is_product = parts.contains(&"src");
        Self {
            file,
            krate,
            is_product,
            code,
            tests_from,
        }
    }

    fn finding(&self, line: usize, rule: String) -> Finding {
        Finding {
            place: format!("{}:{}", self.file.display(), line + 1),
            rule,
        }
    }

    fn names(&self, findings: &mut Vec<Finding>) {
        let stem = self
            .file
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or_default();
        if EMPTY_NAMES.contains(&stem) {
            findings.push(self.finding(0, format!("`{stem}` says nothing about what is in it")));
        }
        for (number, line) in self.code.lines().enumerate() {
            let words: Vec<&str> = line
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .collect();
            if let Some(at) = words.iter().position(|word| *word == "mod")
                && let Some(name) = words.get(at + 1).filter(|name| EMPTY_NAMES.contains(name))
            {
                findings.push(self.finding(
                    number,
                    format!("module `{name}` says nothing about what is in it"),
                ));
            }
        }
    }

    fn words(&self, findings: &mut Vec<Finding>) {
        let may_unsafe = UNSAFE_CRATES.contains(&self.krate);
        let may_print = PRINTING_CRATES.contains(&self.krate) || !self.is_product;
        for (number, line) in self.code.lines().enumerate() {
            if !may_unsafe && has_word(line, "unsafe") {
                findings.push(self.finding(
                    number,
                    format!("unsafe code outside of {}", UNSAFE_CRATES.join(", ")),
                ));
            }
            if may_print || number >= self.tests_from {
                continue;
            }
            for word in ["println!", "eprintln!", "print!", "eprint!", "dbg!"] {
                if has_word(line, word) {
                    findings.push(self.finding(
                        number,
                        format!("`{word}` outside of the command line; use tracing"),
                    ));
                }
            }
            if ENVIRONMENT.iter().any(|call| line.contains(call)) {
                findings.push(self.finding(
                    number,
                    "the environment is the command line's: take an argument".into(),
                ));
            }
        }
    }

    /// Function bodies, by counting braces from each `fn` to the one that closes it.
    fn functions(&self, findings: &mut Vec<Finding>) {
        let lines: Vec<&str> = self.code.lines().collect();
        let product = lines
            .get(..self.tests_from.min(lines.len()))
            .unwrap_or_default();
        if !self.is_product {
            return;
        }
        for (number, line) in product
            .iter()
            .enumerate()
            .filter(|(_, line)| has_word(line, "fn"))
        {
            let Some((open, close)) = body(&lines[number..]) else {
                continue;
            };
            let length = close - open + 1;
            if length > FUNCTION_LINES {
                let name = line
                    .split("fn ")
                    .nth(1)
                    .and_then(|rest| rest.split(['(', '<']).next())
                    .unwrap_or("?");
                let rule =
                    format!("function `{name}` has {length} lines, {FUNCTION_LINES} are the most");
                findings.push(self.finding(number, rule));
            }
        }
    }

    fn forbids_unsafe(&self, text: &str, findings: &mut Vec<Finding>) {
        let is_root = self.is_product
            && (self.file.ends_with("src/lib.rs") || self.file.ends_with("src/main.rs"));
        let forbids = text.contains("#![forbid(unsafe_code)]");
        if is_root && !UNSAFE_CRATES.contains(&self.krate) && !forbids {
            findings.push(self.finding(0, "`#![forbid(unsafe_code)]` is missing".into()));
        }
    }
}

/// Lines of the opening and closing brace of the function that starts in the first of `lines`;
/// `None` for a declaration without a body and for the type of a function.
fn body(lines: &[&str]) -> Option<(usize, usize)> {
    let (mut depth, mut nesting, mut open) = (0usize, 0usize, None);
    for (number, line) in lines.iter().enumerate() {
        let start = if number == 0 {
            line.find("fn").unwrap_or(0)
        } else {
            0
        };
        for letter in line[start..].chars() {
            match letter {
                '(' | '[' => nesting += 1,
                ')' | ']' => nesting = nesting.checked_sub(1)?,
                ';' if open.is_none() && nesting == 0 => return None,
                '{' => {
                    open = open.or(Some(number));
                    depth += 1;
                }
                '}' => {
                    depth = depth.checked_sub(1)?;
                    if depth == 0 {
                        return Some((open?, number));
                    }
                }
                _ => {}
            }
        }
    }
    None
}

/// `word` with nothing of a name before or behind it.
fn has_word(line: &str, word: &str) -> bool {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, found)| {
        let before = line[..at].chars().next_back().is_some_and(is_name);
        let behind = line[at + found.len()..].chars().next().is_some_and(is_name);
        !before && (!behind || word.ends_with('!'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(file: &str, text: &str) -> Vec<String> {
        check(Path::new(file), text)
            .into_iter()
            .map(|finding| format!("{}: {}", finding.place, finding.rule))
            .collect()
    }

    #[test]
    fn broken_rules_are_found_where_they_are() {
        let long = format!(
            "fn long() {{\n{}}}\n",
            "    step();\n".repeat(FUNCTION_LINES)
        );
        let cases = [
            (
                "crates/floe-plan/src/a.rs",
                "fn f() { unsafe { g() } }",
                "a.rs:1: unsafe code outside",
            ),
            (
                "crates/floe-plan/src/a.rs",
                "\nfn f() { println!(\"\") }",
                "a.rs:2: `println!` outside",
            ),
            (
                "crates/floe-plan/src/a.rs",
                "fn f() { std::env::var(\"A\") }",
                "the environment",
            ),
            ("crates/floe-plan/src/utils.rs", "", "`utils` says nothing"),
            (
                "crates/floe-plan/src/a.rs",
                "pub mod common;",
                "module `common` says nothing",
            ),
            (
                "crates/floe-plan/src/lib.rs",
                "//! A crate.",
                "`#![forbid(unsafe_code)]` is missing",
            ),
            (
                "crates/floe-plan/src/a.rs",
                &long,
                "function `long` has 82 lines",
            ),
            (
                "crates/floe-plan/src/a.rs",
                &"\n".repeat(601),
                "the file has 601 lines",
            ),
        ];
        for (file, text, expected) in cases {
            let found = rules(file, text);
            assert!(
                found.iter().any(|rule| rule.contains(expected)),
                "{expected}: {found:?}"
            );
        }
    }

    #[test]
    fn comments_strings_tests_and_the_right_crates_are_let_be() {
        let cases = [
            (
                "crates/floe-plan/src/a.rs",
                "// unsafe println!\nconst A: &str = \"unsafe std::env\";",
            ),
            ("crates/floe-kernel/src/a.rs", "fn f() { unsafe { g() } }"),
            (
                "crates/floe/src/a.rs",
                "fn f() { println!(\"{:?}\", std::env::args()) }",
            ),
            (
                "crates/floe-plan/src/a.rs",
                "#[cfg(test)]\nmod tests { fn f() { println!(\"\") } }",
            ),
            ("crates/floe-plan/tests/a.rs", "fn f() { println!(\"\") }"),
            ("crates/floe-plan/src/lib.rs", "#![forbid(unsafe_code)]"),
        ];
        for (file, text) in cases {
            assert_eq!(rules(file, text), Vec::<String>::new(), "{file}");
        }
    }
}
