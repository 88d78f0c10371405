//! Options of overlay file systems: the directories that they lay over each other.

use floe_kernel::mount::FsOption;

use super::model::split_options;

/// The longest value that `fsconfig(2)` takes.
const LONGEST: usize = 255;

/// Names of single directories.
const SINGLE: [&str; 4] = ["upperdir", "workdir", "lowerdir+", "datadir+"];

/// Every directory that the options name.
pub fn directories(options: &str) -> Vec<String> {
    let mut all = Vec::new();
    for word in split_options(options) {
        match decoded(&word).split_once('=') {
            Some(("lowerdir", list)) => {
                all.extend(lower(list).into_iter().map(|(_, path)| path));
            }
            // What is given one by one is taken as it is, but for the upper one.
            Some((key @ ("upperdir" | "workdir"), path)) if SINGLE.contains(&key) => {
                all.push(unescaped(path));
            }
            Some((key, path)) if SINGLE.contains(&key) => all.push(path.to_string()),
            _ => {}
        }
    }
    all
}

/// The upper directory, where there is one.
pub fn upper(options: &str) -> Option<String> {
    let mut words = split_options(options).into_iter();
    let word = words.find(|word| word.starts_with("upperdir="))?;
    directories(&word).pop()
}

/// The options with other names for the directories.
pub fn with_directories(options: &str, rename: impl Fn(&str) -> String) -> String {
    let changed = |word: String| {
        let plain = decoded(&word);
        let (key, value) = match plain.split_once('=') {
            Some(("lowerdir", list)) => {
                let parts = pieces(list).into_iter().map(|part| match part.as_str() {
                    "" => part,
                    _ => escaped(&rename(&unescaped(&part))),
                });
                ("lowerdir", parts.collect::<Vec<_>>().join(":"))
            }
            Some((key @ ("upperdir" | "workdir"), path)) => {
                (key, escaped(&rename(&unescaped(path))))
            }
            Some((key, path)) if SINGLE.contains(&key) => (key, rename(path)),
            _ => return word,
        };
        format!("{key}={}", encoded(&value))
    };
    let words: Vec<String> = split_options(options).into_iter().map(changed).collect();
    words.join(",")
}

/// As mountinfo shows it; see [`decoded`].
fn encoded(value: &str) -> String {
    let shown = |c: char| match c {
        ' ' | '\t' | '\n' | ',' | '\\' => format!("\\{:03o}", u32::from(c)),
        c => c.to_string(),
    };
    value.chars().map(shown).collect()
}

/// A name as the kernel takes it in lists.
fn escaped(name: &str) -> String {
    let mut text = String::new();
    for c in name.chars() {
        if matches!(c, ':' | ',' | '\\') {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

/// The parts of a list, as they are written; those between two colons are empty.
fn pieces(list: &str) -> Vec<String> {
    let mut all = vec![String::new()];
    let mut escaped = false;
    for c in list.chars() {
        match c {
            ':' if !escaped => all.push(String::new()),
            c => all.last_mut().expect("it has one").push(c),
        }
        escaped = c == '\\' && !escaped;
    }
    all
}

/// A list of lower directories that is too long for one option is given one by one (Linux 6.8).
pub fn option(key: &str, value: &str) -> Vec<FsOption> {
    let text = |key: &str, value: &str| FsOption::Text(key.into(), value.into());
    if key != "lowerdir" || value.len() <= LONGEST {
        return vec![text(key, value)];
    }
    let lower = lower(value).into_iter();
    lower.map(|(key, path)| text(key, &path)).collect()
}

/// The directories of a list, each with the option that adds it alone.
fn lower(list: &str) -> Vec<(&'static str, String)> {
    let mut key = "lowerdir+";
    let mut all = Vec::new();
    for piece in pieces(list) {
        // Behind two colons are those with data only.
        match piece.is_empty() {
            true => key = "datadir+",
            false => all.push((key, unescaped(&piece))),
        }
    }
    all
}

/// An option whose characters that mean something in mountinfo are shown in octal (`\054`).
pub fn decoded(word: &str) -> String {
    let mut plain = Vec::new();
    let mut rest = word.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|_| *first == b'\\');
        let number = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let number = number.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(number.unwrap_or(*first));
        rest = if number.is_some() { &tail[3..] } else { tail };
    }
    String::from_utf8(plain).unwrap_or_else(|_| word.to_string())
}

fn unescaped(text: &str) -> String {
    let mut plain = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        plain.extend(match c {
            '\\' => chars.next(),
            c => Some(c),
        });
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_taken_apart() {
        let found = lower(r"/a:/b\:c:/d::/data");
        let expected = [
            ("lowerdir+", "/a"),
            ("lowerdir+", "/b:c"),
            ("lowerdir+", "/d"),
            ("datadir+", "/data"),
        ];
        let found: Vec<(&str, &str)> = found.iter().map(|(key, path)| (*key, &**path)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn all_directories_are_found() {
        let options = "redirect_dir=on,lowerdir=/l1:/l2,upperdir=/u,workdir=/w,lowerdir+=/x:y";
        assert_eq!(directories(options), ["/l1", "/l2", "/u", "/w", "/x:y"]);
    }

    #[test]
    fn what_is_shown_in_octal_is_decoded() {
        assert_eq!(decoded(r"upperdir=/a\134\054b\040c"), r"upperdir=/a\,b c");
        assert_eq!(decoded(r"x\8\"), r"x\8\");
        let shown = r"lowerdir=/a\134\054b:/c\134:d,upperdir=/u\040v";
        assert_eq!(directories(shown), ["/a,b", "/c:d", "/u v"]);
    }

    #[test]
    fn directories_get_other_names() {
        let options = r"xino=on,lowerdir=/a:b\134\054c::/d,upperdir=u,workdir=/w,datadir+=/e";
        let found = with_directories(options, |name| match name {
            "b,c" => "/new: name".into(),
            "u" => "/up,per".into(),
            name => name.into(),
        });
        let expected = r"xino=on,lowerdir=/a:/new\134:\040name::/d,upperdir=/up\134\054per,workdir=/w,datadir+=/e";
        assert_eq!(found, expected.to_string());
        assert_eq!(
            directories(&found),
            ["/a", "/new: name", "/d", "/up,per", "/w", "/e"]
        );
        assert_eq!(upper(&found).as_deref(), Some("/up,per"));
    }

    #[test]
    fn only_long_lists_are_given_one_by_one() {
        assert_eq!(option("lowerdir", "/a:/b").len(), 1);
        let long = format!("/a:/{}", "b".repeat(300));
        assert_eq!(option("lowerdir", &long).len(), 2);
        assert_eq!(option("upperdir", &long).len(), 1);
    }
}
