//! Fields of decoded images, changed to what no kernel would say.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use floe_image::json::{self, JsonOptions, Payload, Style};
use serde_json::{Number, Value, json};

/// Marsaglia's xorshift; the same mutants in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64, name: &str) -> Random {
        let mixed = name
            .bytes()
            .fold(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), |sum, byte| {
                (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
            });
        Random(mixed | 1)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 11) % limit.max(1) as u64) as usize
    }

    fn one_of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }
}

/// An image, decoded and as it lies in its file.
pub struct Decoded {
    name: String,
    value: Value,
    bytes: Vec<u8>,
}

/// An image file before and after.
pub struct Change {
    pub whole: Vec<u8>,
    pub mutated: Vec<u8>,
}

/// Some changed fields.
pub struct Mutant {
    /// Which, in words.
    pub what: String,
    pub files: BTreeMap<String, Change>,
}

/// All images that have entries.
pub fn load(images: &Path) -> anyhow::Result<Vec<Decoded>> {
    let options = JsonOptions {
        style: Style::Plain,
        payload: Payload::Keep,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(images)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let is_raw = ["pages-", "stats-"].iter().any(|raw| name.starts_with(raw));
        if !name.ends_with(".img") || is_raw {
            continue;
        }
        let path = images.join(&name);
        let bytes = fs::read(&path)?;
        // Rules and addresses of a network namespace have no entries.
        if let Ok(value) = json::decode_to_json(&path, options)
            && value["entries"]
                .as_array()
                .is_some_and(|entries| !entries.is_empty())
        {
            found.push(Decoded { name, value, bytes });
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

/// One to three changed fields.
pub fn mutant(images: &[Decoded], random: &mut Random) -> anyhow::Result<Mutant> {
    let mut mutant = Mutant {
        what: String::new(),
        files: BTreeMap::new(),
    };
    let only = std::env::var("FLOE_MUTANT_FILE").unwrap_or_default();
    let chosen: Vec<&Decoded> = images
        .iter()
        .filter(|image| image.name.contains(&only))
        .collect();
    for _ in 0..=random.below(6) / 4 {
        let image = chosen[random.below(chosen.len())];
        let (what, mutated) = mutated(image, random)?;
        let whole = image.bytes.clone();
        mutant.what += &format!("{}{what} ", image.name);
        mutant
            .files
            .insert(image.name.clone(), Change { whole, mutated });
    }
    Ok(mutant)
}

fn mutated(image: &Decoded, random: &mut Random) -> anyhow::Result<(String, Vec<u8>)> {
    let mut places = Vec::new();
    collect(
        image.value.get("entries").context("no entries")?,
        "/entries".into(),
        &mut places,
    );
    for _ in 0..200 {
        let place = random.one_of(&places).clone();
        let mut changed = image.value.clone();
        let other = image
            .value
            .pointer(random.one_of::<String>(&places))
            .cloned();
        let at = changed.pointer_mut(&place).context("a pointer to itself")?;
        let what = change(at, other.unwrap_or_default(), random);
        let shown: String = at.to_string().chars().take(60).collect();
        // A value that has no form in the field is not one that an image can have.
        if let Ok(bytes) = json::encode_from_json(&changed)
            && bytes != image.bytes
        {
            return Ok((format!("{place} {what} {shown}"), bytes));
        }
    }
    bail!("nothing in {} can be changed", image.name)
}

fn collect(value: &Value, at: String, places: &mut Vec<String>) {
    places.push(at.clone());
    match value {
        Value::Array(items) => {
            for (number, item) in items.iter().enumerate() {
                collect(item, format!("{at}/{number}"), places);
            }
        }
        Value::Object(fields) => {
            for (name, field) in fields {
                collect(field, format!("{at}/{name}"), places);
            }
        }
        _ => {}
    }
}

/// Numbers that programs stumble over.
const NUMBERS: &[i128] = &[
    0,
    1,
    2,
    -1,
    7,
    4095,
    4096,
    0x7fff,
    0x7fff_ffff,
    -0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_f000,
    0x8000_0000_0000,
    0xffff_8000_0000_0000,
    0x7fff_ffff_ffff_ffff,
    -0x8000_0000_0000_0000,
    0xffff_ffff_ffff_f000,
    0xffff_ffff_ffff_ffff,
];

/// Names that lead elsewhere, or nowhere.
const NAMES: &[&str] = &[
    "",
    "/",
    ".",
    "..",
    "../../../../../../../../../../floe-escape",
    "../../../../../../../../../../root/floe-escape",
    "/floe-escape",
    "/out/floe-escape",
    "/out/root/floe-escape",
    "out/../../../floe-escape",
    "a\0b",
    "/proc/1/environ",
    "/dev/null",
    "/home/answer",
    "tmp",
];

fn change(at: &mut Value, other: Value, random: &mut Random) -> &'static str {
    match at {
        Value::Number(number) => {
            let (value, what) = number_for(number, random);
            *at = value;
            what
        }
        Value::String(text) => {
            if random.below(4) == 0 {
                *text = text.chars().rev().collect();
                return "reversed";
            }
            let long = "x".repeat(5000);
            let name = match random.below(12) {
                0 => long.as_str(),
                _ => NAMES[random.below(NAMES.len())],
            };
            let coded = json_bytes(name);
            *text = if random.below(2) == 0 {
                name.to_owned()
            } else {
                coded
            };
            "named"
        }
        Value::Bool(value) => {
            *value = !*value;
            "turned"
        }
        Value::Array(items) if !items.is_empty() => {
            let place = random.below(items.len());
            match random.below(5) {
                0 => {
                    items.remove(place);
                    return "without one";
                }
                1 => items.clear(),
                2 => items.push(items[place].clone()),
                3 => items.extend(vec![items[place].clone(); 3000]),
                _ => items.reverse(),
            }
            "as a list"
        }
        Value::Object(fields) if !fields.is_empty() => {
            let names: Vec<String> = fields.keys().cloned().collect();
            fields.remove(&names[random.below(names.len())]);
            "without a field"
        }
        _ => {
            *at = other;
            "exchanged"
        }
    }
}

fn number_for(number: &Number, random: &mut Random) -> (Value, &'static str) {
    let now = number.as_i64().map(i128::from);
    let now = now.or_else(|| number.as_u64().map(i128::from)).unwrap_or(0);
    let (value, what) = match random.below(6) {
        0 => (now + 1, "more"),
        1 => (now - 1, "less"),
        2 => (now ^ (1 << random.below(40)), "with a bit"),
        3 => (-now, "negative"),
        _ => (*random.one_of(NUMBERS), "set"),
    };
    let wide = i64::try_from(value).map(|value| json!(value));
    let value = wide.or_else(|_| u64::try_from(value).map(|value| json!(value)));
    (value.unwrap_or_else(|_| json!(0)), what)
}

fn json_bytes(name: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(name)
}
