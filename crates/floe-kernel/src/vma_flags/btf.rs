//! The kernel's description of its own types (BTF, `Documentation/bpf/btf.rst`), as far as one iterator
//! program needs it: the number of a function, the offset of a member.

/// Types in one description. A reader of hostile bytes would need it; the kernel's have some 130 000.
const MAX_TYPES: usize = 4 << 20;
/// Unnamed structures inside of one another.
const MAX_DEPTH: u32 = 8;

const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_FUNC: u32 = 12;

/// Bytes of `struct btf_type` in front of what its kind adds.
const HEAD: usize = 12;
/// Bytes of `struct btf_member`.
const MEMBER: usize = 12;

/// A parsed description.
pub(super) struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type begins; the first has the number 1.
    offsets: Vec<u32>,
}

impl<'a> Btf<'a> {
    /// `None` for bytes that are no description of this machine's byte order.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Btf<'a>> {
        const MAGIC: u16 = 0xeb9f;
        let magic = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
        if magic != MAGIC {
            return None;
        }
        let part = |at: usize| {
            let base = word(bytes, 4)? as usize;
            let start = base.checked_add(word(bytes, at)? as usize)?;
            bytes.get(start..start.checked_add(word(bytes, at + 4)? as usize)?)
        };
        let (types, strings) = (part(8)?, part(16)?);
        let mut offsets = Vec::new();
        let mut at = 0;
        while at < types.len() {
            if offsets.len() == MAX_TYPES {
                return None;
            }
            offsets.push(u32::try_from(at).ok()?);
            let info = word(types, at + 4)?;
            at += HEAD + extra(kind(info), (info & 0xffff) as usize)?;
        }
        Some(Btf {
            types,
            strings,
            offsets,
        })
    }

    /// The number of a function.
    pub(super) fn function(&self, name: &str) -> Option<u32> {
        let index = self.find(KIND_FUNC, name)?;
        u32::try_from(index + 1).ok()
    }

    /// Where a member of a structure lies, in bytes; members of unnamed structures inside count.
    pub(super) fn member(&self, structure: &str, name: &str) -> Option<i16> {
        let at = self.offsets[self.find(KIND_STRUCT, structure)?] as usize;
        let bits = self.member_of(at, name, MAX_DEPTH)?;
        i16::try_from(bits / 8).ok().filter(|_| bits % 8 == 0)
    }

    fn member_of(&self, at: usize, name: &str, depth: u32) -> Option<u32> {
        let info = word(self.types, at + 4)?;
        if depth == 0 || !matches!(kind(info), KIND_STRUCT | KIND_UNION) {
            return None;
        }
        let has_bitfields = info >> 31 != 0;
        (0..(info & 0xffff) as usize).find_map(|index| {
            let member = at + HEAD + index * MEMBER;
            let offset = word(self.types, member + 8)?;
            let (offset, width) = if has_bitfields {
                (offset & 0xff_ffff, offset >> 24)
            } else {
                (offset, 0)
            };
            let label = word(self.types, member)?;
            if label == 0 {
                let inner = word(self.types, member + 4)?.checked_sub(1)?;
                let inner = *self.offsets.get(inner as usize)?;
                return Some(offset + self.member_of(inner as usize, name, depth - 1)?);
            }
            (width == 0 && self.is_named(label, name)).then_some(offset)
        })
    }

    fn find(&self, wanted: u32, name: &str) -> Option<usize> {
        self.offsets.iter().position(|&at| {
            let at = at as usize;
            let info = word(self.types, at + 4);
            info.is_some_and(|info| kind(info) == wanted)
                && word(self.types, at).is_some_and(|label| self.is_named(label, name))
        })
    }

    fn is_named(&self, label: u32, name: &str) -> bool {
        let rest = self.strings.get(label as usize..);
        rest.and_then(|rest| rest.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(four.try_into().ok()?))
}

fn kind(info: u32) -> u32 {
    info >> 24 & 0x1f
}

/// Bytes that follow the head of a type with `count` members, by its kind; `None` for a kind that is
/// not known, behind which nothing can be found.
fn extra(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        // Pointers, forward declarations, typedefs, qualifiers, functions, floats, type tags.
        2 | 7..=12 | 16 | 18 => 0,
        // Integers, variables, declaration tags.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        KIND_STRUCT | KIND_UNION => MEMBER * count,
        // Enumerations, prototypes.
        6 | 13 => 8 * count,
        // Sections, enumerations of 64 bits.
        15 | 19 => 12 * count,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { int a; union { long b; }; }` and `func()`.
    fn example() -> Vec<u8> {
        let strings = b"\0outer\0a\0b\0func\0";
        let head = |name: u32, kind: u32, count: u32| [name, kind << 24 | count, 0];
        let mut types = Vec::new();
        types.extend(head(0, KIND_UNION, 1));
        types.extend([9, 0, 0]);
        types.extend(head(1, KIND_STRUCT, 2));
        types.extend([7, 0, 0]);
        types.extend([0, 1, 64]);
        types.extend(head(11, KIND_FUNC, 0));
        let len = types.len() as u32 * 4;
        let mut bytes = 0xeb9fu16.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        for field in [24, 0, len, len, strings.len() as u32] {
            bytes.extend(field.to_ne_bytes());
        }
        types
            .iter()
            .for_each(|word| bytes.extend(word.to_ne_bytes()));
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn members_of_unnamed_unions_and_functions_are_found() {
        let bytes = example();
        let btf = Btf::parse(&bytes).expect("well formed");
        assert_eq!(btf.member("outer", "a"), Some(0));
        assert_eq!(btf.member("outer", "b"), Some(8));
        assert_eq!(btf.member("outer", "c"), None);
        assert_eq!(btf.function("func"), Some(3));
        assert_eq!(btf.function("fun"), None);
    }

    #[test]
    fn cut_descriptions_are_refused_or_lack_something() {
        let bytes = example();
        for len in 0..bytes.len() {
            let found = Btf::parse(&bytes[..len]).and_then(|btf| btf.function("func"));
            assert_eq!(found, None, "{len} bytes");
        }
    }
}
