//! A bounded fuzzer: damaged requests go through the decoder and, where they pass it, through the mapping
//! of options. Nothing may panic. The seed is fixed; `FLOE_FUZZ_ROUNDS` makes it longer.

use floe_image::messages::{
    CgroupRoot, CriuOpts, CriuPageServerInfo, CriuReq, CriuReqType, CriuVethPair, ExtMountMap,
    InheritFd, JoinNamespace, UnixSk,
};
use floe_options::Settings;
use floe_options::command::Command;
use floe_rpc::{Started, apply, decode};
use prost::Message;

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }
}

const TEXTS: &[&str] = &[
    "",
    "/",
    "..",
    "mnt[]:ms",
    "mnt[/a]:b",
    "net[1]:n",
    "tty[8800:19]",
    "file[:]",
    "unix[",
    "a:b:c",
    "apparmor:",
    "selinux:x",
    "\0",
    "\u{7f}\u{fffd}",
    "[]:[]:",
    "user:1,2,3",
    "ipc",
    "pipe:[1]",
];

fn text(random: &mut Random) -> String {
    TEXTS[random.below(TEXTS.len())].repeat(1 + random.below(3))
}

fn number(random: &mut Random) -> i32 {
    const EDGES: &[i32] = &[
        0,
        1,
        -1,
        2,
        7,
        0x4000_0000,
        i32::MAX,
        i32::MIN,
        65535,
        65536,
    ];
    EDGES[random.below(EDGES.len())]
}

fn wild_options(random: &mut Random) -> CriuOpts {
    let some = number(random);
    CriuOpts {
        images_dir_fd: some,
        pid: Some(number(random)),
        ext_mnt: vec![ExtMountMap {
            key: text(random),
            val: text(random),
        }],
        cg_root: vec![CgroupRoot {
            ctrl: Some(text(random)),
            path: text(random),
        }],
        inherit_fd: vec![InheritFd {
            key: text(random),
            fd: number(random).max(some),
        }],
        external: vec![text(random)],
        join_ns: vec![JoinNamespace {
            ns: text(random),
            ns_file: text(random),
            extra_opt: Some(text(random)),
        }],
        veths: vec![CriuVethPair {
            if_in: text(random),
            if_out: text(random),
        }],
        unix_sk_ino: vec![UnixSk { inode: 7 }],
        ps: Some(CriuPageServerInfo {
            port: Some(number(random)),
            ..Default::default()
        }),
        log_level: Some(number(random)),
        log_file: Some(text(random)),
        lsm_profile: Some(text(random)),
        empty_ns: Some(number(random).cast_unsigned()),
        cpu_cap: Some(number(random).cast_unsigned()),
        ghost_limit: Some(number(random).cast_unsigned()),
        timeout: Some(number(random).cast_unsigned()),
        manage_cgroups_mode: (random.below(2) == 0).then(|| number(random)),
        network_lock: (random.below(2) == 0).then(|| number(random)),
        pre_dump_mode: (random.below(2) == 0).then(|| number(random)),
        ..CriuOpts::default()
    }
}

/// Whether the mapping took the options; what follows it in a session is run too.
fn mapped(opts: &CriuOpts, started: Started) -> bool {
    let mut settings = Settings::default();
    let taken = apply(opts, started, &mut settings).is_ok();
    for command in [Command::Dump, Command::Restore] {
        settings.not_yet(command);
    }
    settings.log_path();
    taken
}

fn rounds(usual: usize) -> usize {
    let asked = std::env::var("FLOE_FUZZ_ROUNDS");
    asked
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(usual)
}

#[test]
fn damaged_requests_are_refused_or_mapped() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut decoded = 0;
    for _ in 0..rounds(5_000) {
        let request = CriuReq {
            r#type: CriuReqType::Dump.into(),
            opts: Some(wild_options(&mut random)),
            ..CriuReq::default()
        };
        let mut packet = request.encode_to_vec();
        for _ in 0..random.below(6) {
            let at = random.below(packet.len());
            match random.below(3) {
                0 => packet.truncate(at.max(1)),
                1 => packet[at] = random.below(256) as u8,
                _ => packet.insert(at, 0xff),
            }
        }
        if let Ok(request) = decode(&packet) {
            decoded += 1;
            mapped(&request.opts.unwrap_or_default(), Started::ByCaller);
        }
    }
    assert!(decoded > 0, "the damage is too great to test anything");
}

#[test]
fn options_of_any_value_are_refused_or_mapped() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for _ in 0..rounds(5_000) {
        let opts = wild_options(&mut random);
        mapped(&opts, Started::ByCaller);
        mapped(&opts, Started::AsService);
    }
    let harmless = CriuOpts {
        images_dir_fd: -1,
        ..CriuOpts::default()
    };
    assert!(mapped(&harmless, Started::AsService));
}
