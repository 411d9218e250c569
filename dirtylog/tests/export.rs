//! The export between a writer and a reader: what is right arrives, what is wrong is an error.

mod raw;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dirtylog::export::{
    BlockSpec, LayoutError, Limits, MapError, Mode, ReadError, Reader, Retries, Rounds, Snapshot,
    Sync, Visit, Which, WriteError, Writer, memfd,
};
use dirtylog::{Bitmap, PageSet, Pages};
use raw::{RawExport, block, sync};

fn pair(blocks: &[BlockSpec]) -> (Writer, Reader) {
    let fd = memfd("export").unwrap();
    let reader = Reader::new(fd.try_clone().unwrap(), Limits::default()).unwrap();
    (Writer::new(fd, 4096, blocks).unwrap(), reader)
}

fn set(pages: u64, members: &[u64]) -> PageSet {
    let mut set = PageSet::new(Pages(pages));
    members.iter().for_each(|&page| {
        set.insert(page);
    });
    set
}

#[test]
fn what_is_written_is_read() {
    let (mut writer, mut reader) = pair(&[block("pc.ram", 1000), block("/rom@etc/acpi", 3)]);
    let mut snapshot = Snapshot::new();
    let empty = reader.snapshot(&mut snapshot, Retries::default());
    assert!(matches!(empty, Err(ReadError::Empty)), "{empty:?}");

    let mut update = writer.begin();
    update.dirtied(0, &set(1000, &[0, 999]));
    update.unsent(0, &set(1000, &[5]));
    update.dirtied(1, &set(3, &[2]));
    update.finish(Sync {
        mode: Mode::Migrating,
        round: 4,
        round_ended: true,
        round_begin: Duration::from_millis(1500),
        time: Duration::from_millis(2000),
        finished: true,
        spent: Duration::from_micros(7),
    });
    reader.snapshot(&mut snapshot, Retries::NONE).unwrap();
    let header = snapshot.header().unwrap();
    assert_eq!((header.page_size_bytes, header.blocks), (4096, 2));
    assert_eq!((header.mode, header.round), (Mode::Migrating, 4));
    assert!(header.round_ended && header.unsent_valid && header.finished);
    assert_eq!(header.time - header.round_begin, Duration::from_millis(500));
    assert_eq!((header.syncs, header.spent), (1, Duration::from_micros(7)));
    let [ram, rom] = snapshot.blocks() else {
        panic!("{snapshot:?}");
    };
    assert_eq!((&*ram.name, ram.used_length_bytes), ("pc.ram", 4_096_000));
    assert_eq!(
        (&ram.dirtied, &ram.unsent),
        (&set(1000, &[0, 999]), &set(1000, &[5]))
    );
    assert_eq!((&*rom.name, &rom.dirtied), ("/rom@etc/acpi", &set(3, &[2])));

    let count = |view: dirtylog::export::View| (view.count(), view.runs().count());
    let visit = reader
        .with_block(0, Which::Dirtied, Retries::NONE, count)
        .unwrap();
    assert_eq!(visit, Visit::Whole((Pages(2), 2)));
    let none = reader.with_block(2, Which::Unsent, Retries::NONE, count);
    assert!(matches!(
        none,
        Err(ReadError::NoBlock {
            index: 2,
            blocks: 2
        })
    ));

    // Not migrating any more: there is no "unsent".
    writer.begin().finish(sync(5));
    reader.snapshot(&mut snapshot, Retries::NONE).unwrap();
    assert!(snapshot.blocks()[0].unsent.is_empty());
    assert_eq!(snapshot.blocks()[0].dirtied, set(1000, &[0, 999]));
}

#[test]
fn a_new_layout_is_followed_and_the_file_grows() {
    let (mut writer, mut reader) = pair(&[block("pc.ram", 64)]);
    writer.begin().finish(sync(1));
    let first = reader.header(Retries::NONE).unwrap();
    assert_eq!(reader.blocks(Retries::NONE).unwrap().len(), 1);

    let more = [block("pc.ram", 64), block("dimm1", 1 << 20)];
    writer.set_blocks(&more).unwrap();
    assert_eq!(
        reader.header(Retries::NONE).unwrap(),
        first,
        "not yet published"
    );
    let mut update = writer.begin();
    update.dirtied(1, &set(1 << 20, &[(1 << 20) - 1]));
    update.finish(sync(2));
    let mut snapshot = Snapshot::new();
    reader.snapshot(&mut snapshot, Retries::NONE).unwrap();
    assert_eq!(snapshot.blocks()[1].dirtied.count(), Pages(1));
    assert_ne!(snapshot.header().unwrap().generation, first.generation);
    let blocks = reader.blocks(Retries::NONE).unwrap();
    assert_eq!(
        (&*blocks[1].name, blocks[1].pages),
        ("dimm1", Pages(1 << 20))
    );
}

#[test]
fn an_unfinished_update_is_torn_and_the_next_one_heals_it() {
    let (mut writer, mut reader) = pair(&[block("pc.ram", 64)]);
    writer.begin().finish(sync(1));
    reader.header(Retries::NONE).unwrap();
    let _ = writer.begin(); // the writer died here
    let retries = Retries {
        attempts: 3,
        pause: Duration::ZERO,
    };
    match reader.snapshot(&mut Snapshot::new(), retries) {
        Err(ReadError::Torn {
            attempts: 3,
            sequence,
        }) => assert_eq!(sequence % 2, 1),
        other => panic!("{other:?}"),
    }
    writer.begin().finish(sync(2));
    assert_eq!(reader.header(Retries::NONE).unwrap().round, 2);

    let visit = reader.with_block(0, Which::Dirtied, Retries::NONE, |view| {
        writer.begin().finish(sync(3)); // in the middle of the visit
        view.count()
    });
    assert_eq!(visit.unwrap(), Visit::Torn(Pages(0)));
}

#[test]
fn rounds_that_were_not_collected_are_counted() {
    let (mut writer, reader) = pair(&[block("a", 65), block("b", 10)]);
    let mut rounds = Rounds::new(reader, Retries::NONE);
    let mut dirtied = PageSet::default();
    assert_eq!(rounds.collect(&mut dirtied).unwrap(), None);
    for (round, missed) in [(3, 0), (4, 0), (7, 2)] {
        let mut update = writer.begin();
        update.dirtied(0, &set(65, &[64]));
        update.dirtied(1, &set(10, &[9]));
        update.finish(sync(round));
        let collected = rounds.collect(&mut dirtied).unwrap().unwrap();
        assert_eq!((collected.number, collected.missed), (round, missed));
    }
    // The second block begins with the next word.
    assert_eq!((rounds.first_page(1), rounds.pages()), (128, Pages(138)));
    assert!(dirtied.contains(64) && dirtied.contains(137));
    assert_eq!(dirtied.count(), Pages(2));
    let last = Sync {
        finished: true,
        ..sync(7)
    };
    writer.begin().finish(last);
    let error = rounds.collect(&mut dirtied).unwrap_err();
    assert!(error.to_string().contains("last round was 7"), "{error}");
}

/// The writer sets every word of both blocks to one value; no snapshot may hold two.
#[test]
fn snapshots_are_never_torn() {
    const PAGES: u64 = 64 * 2000;
    let (mut writer, mut reader) = pair(&[block("a", PAGES), block("b", PAGES)]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=3000_u64 {
                let words = vec![round.wrapping_mul(0x9e37_79b9_7f4a_7c15); 2000];
                let pages = PageSet::from_words(Pages(PAGES), words);
                let mut update = writer.begin();
                update.dirtied(0, &pages);
                update.unsent(1, &pages);
                update.finish(sync(round));
                if round % 8 == 0 {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
            done.store(true, Ordering::Release);
        });
        let mut snapshot = Snapshot::new();
        let mut whole = 0;
        while !done.load(Ordering::Acquire) || whole == 0 {
            match reader.snapshot(&mut snapshot, Retries::default()) {
                Ok(()) => whole += 1,
                Err(ReadError::Empty | ReadError::Torn { .. }) => continue,
                Err(error) => panic!("{error}"),
            }
            let round = snapshot.header().unwrap().round;
            let value = round.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let [a, b] = snapshot.blocks() else {
                panic!("{snapshot:?}");
            };
            let same = |set: &PageSet| set.words().iter().all(|&word| word == value);
            assert!(same(&a.dirtied) && same(&b.unsent), "round {round} is torn");
        }
        println!("{whole} whole snapshots");
    });
}

#[test]
fn unsafe_files_are_refused() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let refused = |fd: OwnedFd| Reader::new(fd, Limits::default()).unwrap_err();
    let unsealed = memfd_create("unsealed", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    assert!(matches!(
        refused(unsealed.try_clone().unwrap()),
        MapError::MayShrink
    ));
    assert!(matches!(
        Writer::new(unsealed, 4096, &[]),
        Err(WriteError::Map(MapError::MayShrink))
    ));
    let disk = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    let error = refused(disk.into());
    assert!(
        matches!(error, MapError::NoSeals(_) | MapError::MayShrink),
        "{error}"
    );
    let (pipe, _) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(refused(pipe.into()), MapError::NoSeals(_)));
    let limits = Limits { file_bytes: 100 };
    let error = Reader::new(memfd("long").unwrap(), limits).unwrap_err();
    assert!(
        matches!(
            error,
            MapError::TooShort {
                expected: 4096,
                found: 100
            }
        ),
        "{error}"
    );
}

#[test]
fn impossible_blocks_are_refused_by_the_writer() {
    let refused =
        |size, blocks: &[BlockSpec]| Writer::new(memfd("w").unwrap(), size, blocks).unwrap_err();
    assert!(matches!(refused(4095, &[]), WriteError::PageSize(4095)));
    let long = "x".repeat(256);
    for blocks in [
        vec![block("", 1)],
        vec![block(&long, 1)],
        vec![block("a\0b", 1)],
        vec![block("a", 0)],
        vec![block("a", 1), block("a", 2)],
    ] {
        assert!(
            matches!(refused(4096, &blocks), WriteError::Block(_)),
            "{blocks:?}"
        );
    }
    let (mut writer, mut reader) = pair(&[block(&"x".repeat(255), 1)]);
    writer.begin().finish(sync(1));
    assert_eq!(reader.blocks(Retries::NONE).unwrap()[0].name.len(), 255);
}

/// Every single lie in header or table, and the error that it must cause.
#[test]
fn lies_are_named() {
    type Lie = (usize, u64, fn(&LayoutError) -> bool);
    let entry = 4096 / 8; // the table: two blocks of 100 pages
    let lies: &[Lie] = &[
        (0, 1, |e| matches!(e, LayoutError::Magic(1))),
        (1, 2 | 4096 << 32, |e| matches!(e, LayoutError::Version(2))),
        (1, 1 | 4095 << 32, |e| {
            matches!(e, LayoutError::PageSize(4095))
        }),
        (1, 1, |e| matches!(e, LayoutError::PageSize(0))),
        (8, 4097 << 32, |e| {
            matches!(e, LayoutError::TooManyBlocks(4097))
        }),
        (9, 4096, |e| matches!(e, LayoutError::Used { .. })),
        (9, u64::MAX - 7, |e| matches!(e, LayoutError::Used { .. })),
        (entry, 0, |e| {
            matches!(e, LayoutError::Length { block: 0, .. })
        }),
        (entry + 40, u64::MAX, |e| {
            matches!(e, LayoutError::Length { block: 1, .. })
        }),
        (entry, 10_000 * 4096, |e| {
            matches!(e, LayoutError::Offset { block: 0, .. })
        }),
        (entry + 1, 4096, |e| {
            matches!(e, LayoutError::Offset { offset: 4096, .. })
        }),
        (entry + 2, u64::MAX - 7, |e| {
            matches!(e, LayoutError::Offset { .. })
        }),
        (entry + 2, 4096 + 641, |e| {
            matches!(e, LayoutError::Offset { .. })
        }),
        (entry + 8, 0, |e| matches!(e, LayoutError::Name(0))),
        (entry + 8, 0xff, |e| matches!(e, LayoutError::Name(0))),
        (entry + 10, 0x61, |e| matches!(e, LayoutError::Name(0))),
        (entry + 40 + 8, 0x61, |e| {
            matches!(e, LayoutError::DuplicateName(_))
        }),
    ];
    for &(word, value, expected) in lies {
        let raw = RawExport::new(&[block("a", 100), block("b", 100)]);
        raw.store(word, value);
        let mut reader = raw.reader(Limits::default());
        match reader.snapshot(&mut Snapshot::new(), Retries::NONE) {
            Err(ReadError::Layout(error)) if expected(&error) => {}
            other => panic!("word {word} = {value:#x}: {other:?}"),
        }
    }
    // Two bitmaps at one place; a file shorter than it says; a change without a new generation.
    let raw = RawExport::new(&[block("a", 100), block("b", 100)]);
    raw.store(entry + 1, raw.load(entry + 42));
    let overlap = raw.reader(Limits::default()).header(Retries::NONE);
    assert!(matches!(
        overlap,
        Err(ReadError::Layout(LayoutError::Overlap(_)))
    ));

    let raw = RawExport::new(&[block("a", 100)]);
    raw.store(9, 1 << 20);
    let short = raw.reader(Limits::default()).header(Retries::NONE);
    assert!(
        matches!(short, Err(ReadError::Map(MapError::TooShort { .. }))),
        "{short:?}"
    );

    let raw = RawExport::new(&[block("a", 100)]);
    let mut reader = raw.reader(Limits::default());
    reader.header(Retries::NONE).unwrap();
    raw.store(1, 1 | 8192 << 32);
    let silent = reader.header(Retries::NONE);
    assert!(matches!(
        silent,
        Err(ReadError::Layout(LayoutError::SilentChange))
    ));
}
