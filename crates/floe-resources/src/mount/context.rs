//! Contexts of SELinux among the options of a file system (`mount(8)`, `context=`).

use floe_kernel::security::SecurityModule;

use super::model::split_options;

/// Options whose values are contexts; with commas in them they stand in quotes.
const CONTEXTS: [&str; 4] = ["context", "fscontext", "defcontext", "rootcontext"];

/// The key and the context, without quotes, of an option that is one.
pub fn context(word: &str) -> Option<(&str, &str)> {
    let (key, value) = word.split_once('=')?;
    let quoted = value
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'));
    CONTEXTS
        .contains(&key)
        .then_some((key, quoted.unwrap_or(value)))
}

/// Whether a word has begun a context in quotes that it has not ended.
pub fn is_open(word: &str) -> bool {
    let value = word
        .split_once("=\"")
        .filter(|(key, _)| CONTEXTS.contains(key));
    value.is_some_and(|(_, value)| !value.contains('"'))
}

/// The options to mount with here: without SELinux no file system knows contexts; `instead` is what
/// `--lsm-mount-context` asks for.
pub fn adapted(options: &str, here: SecurityModule, instead: Option<&str>) -> String {
    let mut words = split_options(options);
    if !words.iter().any(|word| context(word).is_some()) {
        return options.to_string();
    }
    words.retain(|word| here == SecurityModule::SeLinux || context(word).is_none());
    for word in &mut words {
        if let (Some(("context", _)), Some(instead)) = (context(word), instead) {
            *word = format!("context=\"{instead}\"");
        }
    }
    words.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str =
        "size=64k,context=\"system_u:object_r:container_file_t:s0:c82,c137\",inode64";

    #[test]
    fn a_context_with_commas_is_one_option() {
        let words = split_options(SAVED);
        assert_eq!(words.len(), 3);
        assert_eq!(
            context(&words[1]),
            Some(("context", "system_u:object_r:container_file_t:s0:c82,c137"))
        );
        assert_eq!(context("size=64k"), None);
    }

    #[test]
    fn a_chosen_context_replaces_the_saved_one() {
        let adapted = |options| adapted(options, SecurityModule::SeLinux, Some("u:r:t:s0:c1,c2"));
        assert_eq!(
            adapted(SAVED),
            "size=64k,context=\"u:r:t:s0:c1,c2\",inode64"
        );
        assert_eq!(adapted("context=a:b:c:s0"), "context=\"u:r:t:s0:c1,c2\"");
        assert_eq!(adapted("rootcontext=a:b:c:s0"), "rootcontext=a:b:c:s0");
        assert_eq!(adapted("size=64k"), "size=64k");
    }

    #[test]
    fn contexts_stay_with_selinux_and_go_without() {
        assert_eq!(adapted(SAVED, SecurityModule::SeLinux, None), SAVED);
        assert_eq!(
            adapted(SAVED, SecurityModule::AppArmor, None),
            "size=64k,inode64"
        );
        assert_eq!(
            adapted(r"lowerdir=/a\,b", SecurityModule::None, None),
            r"lowerdir=/a\,b"
        );
    }
}
